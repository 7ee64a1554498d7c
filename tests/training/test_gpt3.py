"""GPT-3: GPT-Neo of transformers to the digit, both ways, with windows in every second layer; and its program."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from commands import Run, perturbed
from leaves import gradient
from torchweld.errors import UserError
from torchweld.models import GPT3, GPT3Config, gpt3

TINY = gpt3.CONFIGS["tiny"]


def tokens(batch: int, count: int) -> Tensor:
    return torch.randint(TINY.vocab_size, (batch, count))


@pytest.fixture
def published() -> Any:
    transformers = pytest.importorskip(
        "transformers", reason="the oracle of GPT-3 is transformers' GPT-Neo, a test extra"
    )
    config = transformers.GPTNeoConfig(**TINY.to_hugging_face(), bos_token_id=0, eos_token_id=0)
    return perturbed(transformers.GPTNeoForCausalLM(config))


def test_logits_and_gradients_are_those_of_gpt_neo(published: Any, ops: ModuleType) -> None:
    ids = tokens(3, TINY.n_positions)
    model = GPT3(TINY, ops).eval()
    model.load_hugging_face(published.state_dict())
    expected = published(ids, labels=ids)
    assert expected.logits.std() > 0.5  # else 1e-4 would say little
    torch.testing.assert_close(model(ids), expected.logits, rtol=0, atol=1e-4)
    expected.loss.backward()
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    theirs = published.transformer.h[1].attn.attention
    q, k, v = gradient(model.h[1].attn.c_attn.weight).chunk(3)  # type: ignore[union-attr, arg-type]
    scale = (TINY.n_embd // TINY.n_head) ** 0.5  # their queries are smaller by it
    for ours, grad in ((q * scale, theirs.q_proj), (k, theirs.k_proj), (v, theirs.v_proj)):
        torch.testing.assert_close(ours, grad.weight.grad, rtol=1e-4, atol=1e-5 * grad.weight.grad.abs().max().item())


def test_export_loads_into_transformers(published: Any) -> None:
    model = perturbed(GPT3(TINY))
    missing, unexpected = published.load_state_dict(model.to_hugging_face(), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied to wte
    ids = tokens(2, 50)
    with torch.no_grad():
        torch.testing.assert_close(published(ids).logits, model(ids), rtol=0, atol=1e-4)
    assert GPT3Config.from_hugging_face(published.config.to_dict()) == TINY
    again = GPT3(TINY)
    again.load_hugging_face(model.to_hugging_face())
    assert all(torch.allclose(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_banded_layer_sees_its_window(ops: ModuleType) -> None:
    """Through two layers, dense and banded, a token reaches all after it; through the banded one alone, 16 of them."""
    model = perturbed(GPT3(replace(TINY, dropout=0.0), ops))
    x = torch.randn(1, 40, TINY.n_embd)
    changed = x.clone()
    changed[:, 3] += 1.0
    for layer, last in ((0, 40), (1, 3 + TINY.window)):
        attention: Any = model.h[layer].attn
        with torch.no_grad():
            moved = (attention(x, None) != attention(changed, None)).any(-1)[0].nonzero()
        assert moved.flatten().tolist() == list(range(3, last))


@pytest.mark.parametrize("prompt", [1, 40, 70], ids="prompt of {}".format)
def test_cached_and_uncached_decoding_give_the_same_tokens(ops: ModuleType, prompt: int) -> None:
    model, start = perturbed(GPT3(TINY, ops)), tokens(2, prompt)
    cached = model.generate(start, 60, seed=1)
    assert torch.equal(cached, model.generate(start, 60, seed=1, use_cache=False))


@pytest.mark.parametrize(
    "name, parameters",
    [("gpt3-small", 125_198_592), ("gpt3-xl", 1_315_575_808), ("gpt3-2.7b", 2_651_307_520)],
)
def test_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = GPT3(gpt3.CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "gpt2"}, "model_type: expected 'gpt_neo'"),
        ({"activation_function": "relu"}, "activation_function: expected 'gelu_new'"),
        ({"attention_types": [[["global"], 2]]}, r"attention_layers: expected \['global', 'local'\]"),
        ({"attention_types": 7}, "attention_layers: expected"),
        ({"window_size": 0}, "window: expected a positive whole number, but got 0"),
        ({"intermediate_size": 7}, "intermediate_size"),
    ],
)
def test_foreign_configs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GPT3Config.from_hugging_face({**TINY.to_hugging_face(), **values})


@pytest.mark.slow
def test_trains_compares_and_generates(text: str, command: Run) -> None:
    transformers = pytest.importorskip("transformers", reason="loads the checkpoint with transformers, a test extra")
    options = ("--config", "tiny", "--device", "cpu", "--no-keep-memory", "--data", text, "--steps", 30, "--out", "run")
    code, out, _ = command("train", "gpt3", *options, "--compare", "torch")
    assert code == 0 and "they agree" in out and "GPT-3" not in out.split("model:")[0]
    code, first, _ = command("generate", "--checkpoint", "run", "--prompt", "def f(", "--tokens", 100, "--seed", 3)
    assert code == 0 and first.startswith("def f(")
    assert transformers.AutoModelForCausalLM.from_pretrained(Path("run/checkpoint-30")).config.window_size == 16
