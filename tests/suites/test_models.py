"""What transformers' common tests ask of a model, and peft of the model under an adapter, on tiny patched models.

Each is held to the stock model of the same parameters; their own tests, from a checkout: python -m tests.suites.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchweld

transformers = pytest.importorskip("transformers")

VOCAB, N = 61, 12
TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "vocab_size": VOCAB}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8, **SIZES}
CONFIGS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "embd_pdrop": 0.2},
    "LlamaForCausalLM": {**GROUPED, "attention_dropout": 0.2},
    "MistralForCausalLM": {**GROUPED, "sliding_window": 5},
    "Gemma2ForCausalLM": {**GROUPED, "query_pre_attn_scalar": 8, "sliding_window": 5, "final_logit_softcapping": 9.0},
    "GptOssForCausalLM": {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 5},
    "OPTForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48},
    "BertForMaskedLM": {"max_position_embeddings": 64, "is_decoder": False, **SIZES},
    "T5ForConditionalGeneration": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "BartForConditionalGeneration": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48},
}
CONFIGS["T5ForConditionalGeneration"] |= {"decoder_start_token_id": 0, "dropout_rate": 0.1}
CONFIGS["BartForConditionalGeneration"] |= {"decoder_ffn_dim": 48, "decoder_start_token_id": 2, "dropout": 0.1}
DECODERS = [name for name in CONFIGS if name.endswith(("CausalLM", "LMHeadModel"))]
WRITERS = [name for name in CONFIGS if "Masked" not in name]


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """The models have a few thousand parameters."""
    torch.set_num_threads(1)


def pair(name: str) -> tuple[Any, Any]:
    """The stock model, and a patched copy."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    stock = cls(cls.config_class(**TOKENS, initializer_range=0.2, init_std=0.2, **CONFIGS[name])).eval()
    patched = copy.deepcopy(stock)
    assert torchweld.patch(patched).swapped
    return stock, patched


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (rows, N), generator=torch.Generator().manual_seed(1))


def loss(model: Any, ids: Tensor, **more: Any) -> Tensor:
    return model(input_ids=ids, labels=ids, **more).loss


def gradients(model: Any) -> dict[str, Tensor]:
    """Those of the loss in training, with its dropout, from one seed."""
    model.zero_grad()
    torch.manual_seed(5)
    loss(model.train(), tokens()).backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    """Dropout draws the same mask again."""
    _, patched = pair(name)
    expected = gradients(patched)
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(patched), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name: str, side: str) -> None:
    if name.startswith("Bart") and side == "left":
        pytest.skip("Bart's encoder counts the padding in its positions, without torchweld too")
    _, patched = pair(name)
    ids, padding = tokens(1), torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat([padding, ids] if side == "left" else [ids, padding], 1)
    mask = (padded > 0).long()
    if patched.config.is_encoder_decoder:
        own, alone, beside = slice(None), {"decoder_input_ids": ids}, {"decoder_input_ids": ids}
    else:
        own = slice(4, None) if side == "left" else slice(N)
        alone, beside = {}, {"position_ids": mask.cumsum(1).sub(1).clamp(0)}
    got = patched(input_ids=padded, attention_mask=mask, **beside).logits[:, own]
    torch.testing.assert_close(got, patched(input_ids=ids, **alone).logits, rtol=1e-4, atol=1e-4)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 8, "num_return_sequences": 2},
    "looked up in the prompt": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WRITERS)
def test_generation(name: str, way: str) -> None:
    """Token for token; the second of the prompts is padded."""
    ids = tokens(1 if "looked" in way else 2)
    mask = torch.ones_like(ids)
    mask[1:, :5] = 0
    found = []
    for model in pair(name):
        torch.manual_seed(3)
        options = {"max_new_tokens": 8, "do_sample": False, **WAYS[way]}
        found.append(model.generate(ids * mask, attention_mask=mask, **options))
    assert found[0].shape[1] >= 8
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_in_pieces(name: str) -> None:
    """Also past the window of those that have one."""
    _, patched = pair(name)
    expected, cache, got = patched(tokens()).logits, transformers.DynamicCache(config=patched.config), []
    for piece in tokens().split([4, 1, 3, 4], 1):
        got.append(patched(piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """A patched model is saved as a stock one, and loads as one."""
    stock, patched = pair(name)
    patched.save_pretrained(tmp_path)
    twin = type(stock).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loss(twin, tokens()), loss(stock, tokens()), rtol=1e-5, atol=1e-5)
    assert twin.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration"]
)
def test_adapters(name: str) -> None:
    """LoRA over a patched model and over the stock one: a step of training, disabled, merged, unloaded."""
    peft = pytest.importorskip("peft")
    courses = []
    for model in pair(name):
        torch.manual_seed(2)
        fan = name.startswith("GPT2")
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(target_modules="all-linear", r=4, lora_alpha=16, fan_in_fan_out=fan)
        ).eval()
        optimizer = torchweld.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.02)
        course = []
        for _ in range(3):
            optimizer.zero_grad()
            course.append(loss(wrapped, tokens()))
            course[-1].backward()
            optimizer.step()
        with wrapped.disable_adapter():
            course.append(loss(wrapped, tokens()))
        course.append(loss(wrapped, tokens()))
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(loss(merged, tokens()), course[-1], rtol=1e-4, atol=1e-4)
        courses.append(torch.stack(course).detach())
    assert courses[0][2] < courses[0][0] and torch.equal(courses[0][3], courses[0][0])
    torch.testing.assert_close(*courses, rtol=1e-3, atol=1e-3)
