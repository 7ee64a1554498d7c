"""Models of Hugging Face transformers, stock and patched: logits, gradients, generation, training."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch

import torchweld
from torchweld import hugging_face, nn, ops
from torchweld.patching.subclasses import is_swapped
from torchweld.testing.modules import Trial, check_modules, evaluate_module

transformers = pytest.importorskip("transformers")

VOCAB, BATCH, N = 97, 3, 11
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
DECODER = {"vocab_size": VOCAB, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, **SIZES}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """The models have a few thousand parameters."""
    torch.set_num_threads(1)


def build(name: str, **more: Any) -> torch.nn.Module:
    """A tiny model of random weights, in evaluation."""
    torch.manual_seed(0)
    options = {
        "GPT2LMHeadModel": {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB},
        "BertForMaskedLM": {"vocab_size": VOCAB, "max_position_embeddings": 32, **SIZES},
        "T5ForConditionalGeneration": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        "ViTForImageClassification": {"image_size": 16, "patch_size": 4, **SIZES},
    }.get(name, DECODER)
    if name.startswith("T5"):
        options = options | {"vocab_size": VOCAB, "decoder_start_token_id": 0, "dropout_rate": 0.0}
    tokens = {} if name.startswith("ViT") else TOKENS
    implementation = {k: more.pop(k) for k in ("attn_implementation",) if k in more}
    cls = getattr(transformers, name)
    config = cls.config_class(**{"initializer_range": 0.2, **options, **tokens, **more})
    return cls._from_config(config, **implementation).eval()


def batch(padding: str | None) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (BATCH, N), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :4] = mask[1, :1] = 0
    elif padding == "right":
        mask[0, 7:] = mask[1, 10:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model: torch.nn.Module, pixels: torch.Tensor | None = None, *, padding: str | None = None) -> torch.Tensor:
    """Those of the tokens that are not padding: what stands at padding is nobody's business."""
    if pixels is not None:
        return model(pixel_values=pixels).logits
    given = batch(padding)
    if model.config.is_encoder_decoder:
        return model(**given, labels=batch(None)["input_ids"]).logits
    return model(**given).logits[given["attention_mask"].bool()]


def implementations(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The stock model and a patched copy."""
    patched = copy.deepcopy(model)
    torchweld.patch(patched)
    return model, patched


MODELS = [
    "GPT2LMHeadModel",
    "BertForMaskedLM",
    "LlamaForCausalLM",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
    "Gemma2ForCausalLM",
]


@pytest.mark.parametrize("name", MODELS)
def test_everything_is_swapped(name: str) -> None:
    model = build(name)
    report = torchweld.patch(model)
    assert model.config._attn_implementation == "torchweld" and not report.left
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    assert norms
    for m in norms:
        assert type(m) is nn.LayerNorm or is_swapped(type(m))
    assert [e.was for e in report.undo().left] == []
    assert model.config._attn_implementation == ("eager" if name.startswith("Gemma2") else "sdpa")


@pytest.mark.parametrize(
    ("dtype", "padding"),
    [(torch.float32, None), (torch.float32, "left"), (torch.float32, "right"), (torch.bfloat16, "left")],
)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str, dtype: torch.dtype, padding: str | None) -> None:
    """By the one rule. Their norms compute in float32 always: what is exact is the patched model in float64."""
    vision = name.startswith("ViT")
    if vision and padding:
        pytest.skip("an image has no padding")
    stock, patched = implementations(build(name).to(dtype))
    call = partial(logits, padding=padding)
    draws = [[torch.randn(2, 3, 16, 16).to(dtype)] if vision else [] for _ in range(2)]
    check_modules([Trial(patched, stock, call, x, patched) for x in draws], f"{dtype} {padding}")
    if name.startswith("Gemma2") and padding == "left":
        return  # its eager softmax casts float64's least value to float32: rows of padding alone are NaN there
    wide = [evaluate_module(m.double(), call, [x.double() for x in draws[0]]) for m in (patched, stock)]
    torch.testing.assert_close(wide[0], wide[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_a_cache_continues_where_it_stood(name: str) -> None:
    _, patched = implementations(build(name))
    ids, whole = batch(None)["input_ids"], patched(**batch(None)).logits
    first = patched(ids[:, :6], use_cache=True)
    rest = patched(ids[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)


def test_the_implementation_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face.register()
    calls: list[int] = []
    right = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **k: calls.append(1) or right(*a, **k))
    stock, ours = (build("LlamaForCausalLM", attn_implementation=n) for n in ("sdpa", "torchweld"))
    for padding in (None, "left"):
        torch.testing.assert_close(logits(ours, padding=padding), logits(stock, padding=padding), rtol=1e-4, atol=1e-4)
    assert len(calls) == 2 * 2
    assert "already torchweld's" in str(torchweld.patch(ours))


def test_weights_on_request() -> None:
    stock, ours = (build("BertForMaskedLM", attn_implementation=n) for n in ("eager", "torchweld"))
    for got, expected in zip(
        ours(**batch("right"), output_attentions=True).attentions,
        stock(**batch("right"), output_attentions=True).attentions,
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_softcap_and_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the interface: what sdpa of torch cannot do, and transformers does eagerly."""
    q, k, v = torch.randn(2, 4, N, 8), torch.randn(2, 2, N, 8), torch.randn(2, 2, N, 8)
    module, sinks = torch.nn.Module(), torch.randn(4)
    scores = q @ k.repeat_interleave(2, 1).mT * 0.3
    scores = 2.0 * torch.tanh(scores / 2.0)
    scores = scores.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
    scores = torch.cat([scores, sinks[None, :, None, None].expand(2, 4, N, 1)], -1)
    expected = scores.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)
    got, weights = hugging_face.attention_forward(module, q, k, v, None, scaling=0.3, softcap=2.0, s_aux=sinks)
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert weights is None and got.is_contiguous()


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_autocast(name: str) -> None:
    stock, patched = implementations(build(name))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = logits(patched, padding="left"), logits(stock, padding="left")
    assert got.dtype == expected.dtype
    wide = logits(copy.deepcopy(stock).double(), padding="left")
    assert (got - wide).abs().max() <= 2 * (expected - wide).abs().max()


def losses(model: torch.nn.Module, steps: int) -> list[float]:
    """Training on one small text, without dropout."""
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for _ in range(steps):
        start = torch.randint(0, 50, (8, 1), generator=generator)
        ids = (start + torch.arange(16) * 3) % VOCAB
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize(
    ("name", "still"),
    [
        ("GPT2LMHeadModel", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
        ("BertForMaskedLM", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    ],
)
def test_training_takes_the_same_course(name: str, still: dict[str, float]) -> None:
    model = build(name, initializer_range=0.02, **still).train()
    expected, got = (losses(m, 25) for m in implementations(model))
    assert expected[-1] < 0.7 * expected[0]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-3, atol=0)
