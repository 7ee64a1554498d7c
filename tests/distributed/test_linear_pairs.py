"""Models of transformers spread over two processes by the names of their layers, beside one process in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchweld
from gloo_processes import in_processes, needs_gloo
from torchweld.testing.parity import assert_parity
from training_curves import Loss, check_parameters, curve

pytestmark = [needs_gloo, pytest.mark.slow]
LENGTHS = torch.tensor([11, 7, 4])
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DROPS_NOTHING = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DROPS_OF_GPT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}


def words(model: Any) -> Loss:
    """Padded."""
    mask = (torch.arange(11) < LENGTHS[:, None]).long()

    def loss(generator: torch.Generator) -> Any:
        tokens = torch.randint(5, 97, (3, 11), generator=generator)
        return model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss

    return loss


def pairs(model: Any) -> Loss:
    mask = (torch.arange(11) < LENGTHS[:, None]).long()

    def loss(generator: torch.Generator) -> Any:
        source, targets = (torch.randint(5, 97, (3, n), generator=generator) for n in (11, 6))
        return model(source, attention_mask=mask, labels=targets).loss

    return loss


def pictures(model: Any) -> Loss:
    def loss(generator: torch.Generator) -> Any:
        images: Tensor = torch.randn(3, 3, 16, 16, generator=generator).to(model.dtype)
        return model(images, labels=torch.tensor([0, 1, 1])).loss

    return loss


def models(of: Any) -> list[tuple[str, Callable[[], Any], Callable[[Any], Loss]]]:
    grouped = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
    gpt = of.GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, **dict.fromkeys(DROPS_OF_GPT, 0.0)
    )
    t5 = of.T5Config(vocab_size=97, **T5_SIZES, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
    images = {**SIZES, "image_size": 16, "patch_size": 4}
    del images["vocab_size"]
    return [
        ("Llama", lambda: of.LlamaForCausalLM(of.LlamaConfig(**grouped)), words),
        ("Qwen3", lambda: of.Qwen3ForCausalLM(of.Qwen3Config(**grouped, head_dim=8)), words),  # norms of each head
        ("BERT", lambda: of.BertForMaskedLM(of.BertConfig(**SIZES, **DROPS_NOTHING)), words),
        ("GPT-2", lambda: of.GPT2LMHeadModel(gpt), words),
        ("T5", lambda: of.T5ForConditionalGeneration(t5), pairs),
        ("ViT", lambda: of.ViTForImageClassification(of.ViTConfig(**images)), pictures),
    ]


def spread(rank: int, folder: str) -> None:
    """patch() before and after."""
    transformers = pytest.importorskip("transformers")
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

    from torchweld.distributed import tensor_parallel  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (2,))
    for name, make, loss in models(transformers):
        torch.manual_seed(0)
        fresh = make()
        theirs, exact = copy.deepcopy(fresh), copy.deepcopy(fresh).double()
        right = curve(theirs, loss(theirs)), curve(exact, loss(exact), torch.float64)
        for before in (True, False):
            ours = copy.deepcopy(fresh)
            if before:
                torchweld.patch(ours)
            tensor_parallel(ours, mesh)
            if not before:
                torchweld.patch(ours)
            assert_parity(curve(ours, loss(ours)), *right, op=name, case=f"patched {'before' if before else 'after'}")
            check_parameters(ours, exact)

    def refused(model: Any, message: str) -> None:
        with pytest.raises(RuntimeError, match=message):
            tensor_parallel(model, mesh)
        assert not any(hasattr(p, "placements") for p in model.parameters())

    one = transformers.LlamaConfig(**SIZES, num_key_value_heads=1)
    refused(transformers.LlamaForCausalLM(one), "divides the model's 1 key heads, but got 2")
    odd = {**SIZES, "hidden_size": 33, "num_attention_heads": 3}
    refused(transformers.BertModel(transformers.BertConfig(**odd)), "divides the model's 3 heads, but got 2")
    normed = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES, pad_token_id=0))
    refused(normed, r"an attention with no parameters of its own .* but got .*self_attn.q_norm.weight \[32\]")
    refused(transformers.DebertaV2Model(transformers.DebertaV2Config(**SIZES)), "but got DebertaV2Model; write a plan")


def test_models_of_transformers() -> None:
    in_processes(spread, 2)
