"""Many families of Hugging Face transformers, stock and patched: masks of every form, losses, gradients, generation."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torchweld

transformers = pytest.importorskip("transformers")

VOCAB, BATCH, N = 97, 3, 12
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**SIZES, "num_key_value_heads": 2}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
HEADS = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
PAIR = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, **HEADS},
    "forced_eos_token_id": None,
    "decoder_start_token_id": 0,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
CAUSAL: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": OLD,
    "GPTJForCausalLM": {**OLD, "rotary_dim": 4},
    "GPTBigCodeForCausalLM": OLD,
    "GPTNeoXForCausalLM": SIZES,
    "OPTForCausalLM": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "FalconForCausalLM": SIZES,
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": {**GROUPED, "sliding_window": 5},
    "Qwen2ForCausalLM": GROUPED,
    "Gemma3ForCausalLM": {**GROUPED, "head_dim": 8, "sliding_window": 5},
    "PhiForCausalLM": SIZES,
    "Phi3ForCausalLM": GROUPED,
    "StableLmForCausalLM": GROUPED,
    "GraniteForCausalLM": GROUPED,
    "Olmo2ForCausalLM": GROUPED,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "RobertaForMaskedLM": SIZES,
    "DistilBertForMaskedLM": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "AlbertForMaskedLM": {**SIZES, "embedding_size": 16},
    "ModernBertForMaskedLM": {**SIZES, "local_attention": 6, "global_attn_every_n_layers": 2},
}
PAIRS = {"BartForConditionalGeneration": PAIR, "MarianMTModel": PAIR, "UMT5ForConditionalGeneration": T5}


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """The models have a few thousand parameters."""
    torch.set_num_threads(1)


def build(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A tiny model of weights that are not all alike, and a patched copy."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    tokens = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    stock = cls(cls.config_class(**tokens, **{**CAUSAL, **ENCODERS, **PAIRS}[name])).eval()
    for p in stock.parameters():
        if p.dim() > 1:
            p.data.mul_(4)
    patched = copy.deepcopy(stock)
    assert torchweld.patch(patched).swapped
    return stock, patched


IDS = torch.randint(3, VOCAB, (BATCH, N), generator=torch.Generator().manual_seed(1))
RIGHT = torch.arange(N) < torch.tensor([[7], [11], [12]])
LEFT = RIGHT.flip(1)


def results(model: Any, mask: torch.Tensor, seen: torch.Tensor) -> list[torch.Tensor]:
    """Logits and loss of what is no padding, and every gradient."""
    model.zero_grad()
    out = model(input_ids=IDS, attention_mask=mask, labels=IDS.masked_fill(~seen, -100))
    logits = out.logits if model.config.is_encoder_decoder else out.logits[seen]
    (out.loss + logits.square().mean()).backward()
    return [logits.detach(), out.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def masks(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Masks, and which tokens are no padding."""
    found = [(torch.ones_like(IDS), torch.ones_like(RIGHT)), (LEFT.long(), LEFT), (RIGHT.long(), RIGHT)]
    if name in PAIRS or name[:3] in ("OPT", "Blo"):  # which take 2 dimensions only
        return found
    causal = torch.ones(N, N, dtype=torch.bool).tril(0 if name in CAUSAL else N)
    square = RIGHT[:, None, None, :] & causal
    additive = torch.zeros(square.shape).masked_fill(~square, torch.finfo(torch.float32).min)
    return [*found, (square, RIGHT), (additive, RIGHT)]


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS, *PAIRS])
def test_logits_losses_and_gradients(name: str) -> None:
    stock, patched = build(name)
    for mask, seen in masks(name):
        expected, got = (results(m, mask, seen) for m in (stock, patched))
        assert len(got) == len(expected)
        top = max(float(g.abs().max()) for g in expected[2:])
        for a, b in zip(got, expected, strict=True):
            assert (a - b).abs().max() <= 1e-3 * max(float(b.abs().max()), 1e-2 * top), (mask.shape, mask.dtype)


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}, {"do_sample": True}],
    ids=lambda how: " ".join(how) or "greedy",
)
@pytest.mark.parametrize("name", [*list(CAUSAL)[::3], *PAIRS])
def test_generation_token_for_token(name: str, how: dict[str, Any]) -> None:
    found = []
    for model in build(name):
        torch.manual_seed(3)
        options = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False, **how}
        try:
            found.append(model.generate(IDS * LEFT, attention_mask=LEFT.long(), **options))
        except ValueError as e:  # a cache that a family has not
            found.append(str(e))
    assert found[0] == found[1] if isinstance(found[0], str) else torch.equal(*found)


def test_an_assistant() -> None:
    found = [
        m.generate(IDS[:1], max_new_tokens=8, do_sample=False, assistant_model=m) for m in build("LlamaForCausalLM")
    ]
    assert torch.equal(*found)


def test_a_pickled_model_knows_its_attention_in_another_process(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")[1]
    with torch.no_grad():
        (tmp_path / "model").write_bytes(pickle.dumps((model, IDS, model(IDS).logits)))
    program = """
import pickle, sys, torch
model, ids, expected = pickle.load(open(sys.argv[1], "rb"))
torch.testing.assert_close(model(ids).logits, expected)
print(model.config._attn_implementation)
"""
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "model")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.stdout == "torchweld\n", done.stderr


@pytest.mark.parametrize("first", [0, 1])
def test_patches_of_a_model_inside_a_model_are_undone_in_any_order(first: int) -> None:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=8),
        text_config=transformers.LlamaConfig(vocab_size=VOCAB, **GROUPED),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    parts = (config.text_config, config.vision_config, config)
    before = [part._attn_implementation for part in parts]
    reports = [torchweld.patch(model.model.language_model), torchweld.patch(model)]
    assert {part._attn_implementation for part in parts} == {"torchweld"}
    for i in (first, 1 - first):
        reports[i].undo()
    assert [part._attn_implementation for part in parts] == before
