"""GPT-2: the published model to the digit, on our functions and on torch's; decoding with and without a cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from commands import perturbed
from leaves import gradient
from torchweld.errors import UserError
from torchweld.models import CONFIGS, GPT2, GPT2Config, stock
from torchweld.models.decoding import sample

TINY = CONFIGS["tiny"]


def tokens(batch: int, count: int, config: GPT2Config = TINY) -> Tensor:
    return torch.randint(config.vocab_size, (batch, count))


@pytest.fixture
def model(ops: ModuleType) -> GPT2:
    return perturbed(GPT2(TINY, ops))


@pytest.mark.parametrize(
    "name, parameters",
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = GPT2(CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_initial_values() -> None:
    model = GPT2(replace(TINY, n_embd=256, n_layer=8))
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.02)
    blocks: Any = model.h
    assert blocks[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert blocks[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)  # sqrt(2 x 8 layers) = 4
    assert blocks[0].attn.c_attn.bias.abs().max() == 0 and (model.ln_f.weight == 1).all()


def test_weight_decay_spares_biases_and_norms() -> None:
    model = GPT2(TINY)
    decayed, spared = model.parameter_groups(0.1)
    names = {p: name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all(names[p].endswith(".bias") or ".ln_" in names[p] or "ln_f" in names[p] for p in spared["params"])
    assert len(decayed["params"]) == 2 + 4 * TINY.n_layer
    assert {*decayed["params"], *spared["params"]} == set(names)


# ---- Against Hugging Face


@pytest.fixture
def published() -> torch.nn.Module:
    transformers = pytest.importorskip(
        "transformers", reason="the oracle of GPT-2 is transformers; install the test extra"
    )
    values = {**TINY.to_hugging_face(), "bos_token_id": 0, "eos_token_id": 0}
    return perturbed(transformers.GPT2LMHeadModel(transformers.GPT2Config(**values)))


def test_logits_are_those_of_transformers(published: torch.nn.Module, ops: ModuleType) -> None:
    ids = tokens(3, TINY.n_positions)
    model = GPT2(TINY, ops).eval()
    model.load_hugging_face(published.state_dict())
    with torch.no_grad():
        expected = published(ids).logits
        assert expected.std() > 0.5  # else 1e-4 would say little
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)


def test_gradients_are_those_of_transformers(published: Any, ops: ModuleType) -> None:
    ids = tokens(2, 33)
    model = GPT2(TINY, ops)
    model.load_hugging_face(published.state_dict())
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    published(ids, labels=ids).loss.backward()
    expected = dict(published.transformer.named_parameters())
    for name, p in model.named_parameters():
        grad = expected[name].grad
        got = gradient(p).t() if "c_" in name and p.dim() == 2 else gradient(p)
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item(), msg=name)


def test_export_loads_into_transformers(published: Any) -> None:
    model = perturbed(GPT2(TINY))
    missing, unexpected = published.load_state_dict(model.to_hugging_face(), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied to wte
    ids = tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(published(ids).logits, model(ids), rtol=0, atol=1e-4)
    assert GPT2Config.from_hugging_face(published.config.to_dict()) == TINY


def test_import_takes_the_published_files_names_and_buffers() -> None:
    source, target = perturbed(GPT2(TINY)), GPT2(TINY)
    state = {name.removeprefix("transformer."): t for name, t in source.to_hugging_face().items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    state["lm_head.weight"] = source.wte.weight.detach()
    target.load_hugging_face(state)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("transformer.ln_f.weight"), r"'ln_f.weight' is missing"),
        (lambda s: s.update(extra=torch.ones(1)), r"'extra' is not one of them"),
        (lambda s: s.update({"transformer.wte.weight": torch.ones(9, 64)}), r"wte.weight: expected shape \[512, 64\]"),
        (lambda s: s.update({"lm_head.weight": torch.ones(512, 64)}), r"lm_head.weight: expected it tied"),
    ],
)
def test_foreign_weights_are_refused_and_nothing_is_loaded(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    model = GPT2(TINY)
    before = copy.deepcopy(model.state_dict())
    state = perturbed(GPT2(TINY)).to_hugging_face()
    change(state)
    with pytest.raises(UserError, match=message):
        model.load_hugging_face(state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "bert"}, "model_type: expected 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function: expected 'gelu_new'"),
        ({"n_inner": 100}, "n_inner"),
        ({"n_head": 3}, "n_embd divisible by n_head"),
        ({"n_layer": "two"}, "n_layer: expected a positive whole number"),
    ],
)
def test_foreign_configs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GPT2Config.from_hugging_face({**TINY.to_hugging_face(), **values})
    with pytest.raises(UserError, match="n_head is missing"):
        GPT2Config.from_hugging_face({k: v for k, v in TINY.to_hugging_face().items() if k != "n_head"})


# ---- Ours beside stock


def test_ours_and_stock_share_state_and_results() -> None:
    ours, theirs = perturbed(GPT2(TINY)), GPT2(TINY, stock)
    theirs.load_state_dict(ours.state_dict())
    ids = tokens(2, 65)
    losses = [m.loss(ids[:, :-1], ids[:, 1:]) for m in (ours, theirs)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        atol = 1e-5 * gradient(b).abs().max().item()
        torch.testing.assert_close(gradient(a), gradient(b), rtol=1e-4, atol=atol, msg=name)


def test_autocast_keeps_the_stream_in_float32(model: GPT2) -> None:
    ids = tokens(2, 40)
    with torch.no_grad():
        exact = model.hidden(ids)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.hidden(ids)
    assert rounded.dtype == torch.float32
    assert 1e-5 < (rounded - exact).abs().max() / exact.abs().max() < 0.05


def test_a_model_can_be_copied(model: GPT2) -> None:
    ids = tokens(1, 10)
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))


def test_dropout_only_while_training(ops: ModuleType) -> None:
    model = perturbed(GPT2(replace(TINY, dropout=0.5), ops))
    ids = tokens(1, 10)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_too_many_tokens() -> None:
    with pytest.raises(UserError, match="at most n_positions = 64 tokens, but got 65"):
        GPT2(TINY)(tokens(1, 65))


# ---- Generation


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.0}, {"seed": 1}, {"seed": 2, "top_k": 20}, {"seed": 3, "top_p": 0.7, "temperature": 0.8}],
    ids=str,
)
@pytest.mark.parametrize("prompt", [1, 30, 64, 70], ids="prompt of {}".format)  # 64: the context is full; 70: cut
def test_cached_and_uncached_decoding_give_the_same_tokens(model: GPT2, prompt: int, sampling: dict[str, Any]) -> None:
    start = tokens(2, prompt)
    cached = model.generate(start, 90, **sampling)  # past the end of the context, more than once
    assert cached.shape == (2, prompt + 90) and torch.equal(cached[:, :prompt], start)
    assert torch.equal(cached, model.generate(start, 90, use_cache=False, **sampling))


def test_greedy_tokens_are_the_likeliest(model: GPT2) -> None:
    ids = model.generate(tokens(1, 5), 20, temperature=0.0)
    with torch.no_grad():
        assert torch.equal(model(ids[:, :-1]).argmax(-1)[:, 4:], ids[:, 5:])


def test_cache_takes_several_tokens_at_once(model: GPT2) -> None:
    ids = tokens(2, 50)
    cache = model.cache(2)
    with torch.no_grad():
        pieces = [model(part, cache) for part in ids.split([20, 1, 29], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids), rtol=1e-5, atol=1e-5)


def test_seed_decides_the_draws(model: GPT2) -> None:
    start = tokens(1, 5)
    first = model.generate(start, 30, seed=5)
    assert torch.equal(first, model.generate(start, 30, seed=5))
    assert not torch.equal(first, model.generate(start, 30, seed=6))


def test_sampling_frequencies() -> None:
    p = torch.tensor([0.1, 0.4, 0.2, 0.3])
    generator = torch.Generator().manual_seed(0)

    def check(
        expected: list[float], temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
    ) -> None:
        drawn = sample(p.log().expand(20000, 4), temperature, top_k, top_p, generator)
        got = torch.bincount(drawn, minlength=4) / 20000
        torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=0.015)  # more than 4 standard deviations

    check([0.1, 0.4, 0.2, 0.3])
    check([0.0, 4 / 7, 0.0, 3 / 7], top_k=2)
    check([0.0, 4 / 7, 0.0, 3 / 7], top_p=0.65)  # 0.4 does not reach it, 0.4 + 0.3 does
    check([0.0, 1.0, 0.0, 0.0], top_p=0.01)
    check([0.0, 4 / 7, 0.0, 3 / 7], top_k=3, top_p=0.65)
    check([1 / 30, 16 / 30, 4 / 30, 9 / 30], temperature=0.5)
    check([0.0, 1.0, 0.0, 0.0], temperature=1e-4)
    check([0.0, 1.0, 0.0, 0.0], temperature=1e-30)


@pytest.mark.parametrize(
    "sampling, message",
    [
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0, but got -1.0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k: expected at least 1, but got 0"),
        ({"top_p": 0.0}, "top_p: expected a number in"),
        ({"top_p": 1.5}, "top_p: expected a number in"),
    ],
)
def test_nonsense_sampling_is_refused(sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GPT2(TINY).generate(tokens(1, 3), 1, **sampling)
    with pytest.raises(UserError, match="tokens: expected shape"):
        GPT2(TINY).generate(torch.empty(1, 0, dtype=torch.long), 1)


def test_an_empty_batch_has_logits_of_its_shape() -> None:
    config = CONFIGS["tiny"]
    assert GPT2(config)(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 5, config.vocab_size)
