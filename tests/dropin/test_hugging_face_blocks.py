"""patch: dropout, residual add and norm at the end of BERT's blocks run as one op, where nothing sees their calls."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import torchweld
from leaves import gradient
from patch_models import distance
from torchweld import ops, reference
from torchweld.integrations import hugging_face_layers
from torchweld.reference.philox import draw_seed

transformers = pytest.importorskip("transformers")

LAYERS = 2
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
NOW = "its dropout, residual add and norm: torchweld.ops.add_layer_norm"


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """The models have a few thousand parameters."""
    torch.set_num_threads(1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The dropout of every call of the op; models of any size use it."""
    seen: list[float] = []
    right = ops.add_layer_norm
    monkeypatch.setattr(hugging_face_layers, "_PAYS", 0)
    monkeypatch.setattr(ops, "add_layer_norm", lambda *a, **k: seen.append(k["dropout_p"]) or right(*a, **k))
    yield seen


def small(name: str = "BertForMaskedLM", p: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    dropout = {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}
    tokens = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = cls(cls.config_class(**{**SIZES, **dropout, **tokens, **options}))
    for parameter in model.parameters():  # norms that are not all alike
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def results(model: Any, hidden_states: bool = True) -> list[Tensor]:
    """Logits, loss, hidden states and every gradient."""
    model.zero_grad()
    torch.manual_seed(1)
    out = model(input_ids=IDS, labels=IDS, output_hidden_states=hidden_states)
    out.loss.backward()
    found = [out.logits.detach(), out.loss.detach(), *(h.detach() for h in out.hidden_states or ())]
    return found + [gradient(p).clone() for p in model.parameters() if p.grad is not None]


def close(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-2 * tolerance * max(1.0, float(b.abs().max())))


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def of_blocks(report: Any) -> list[str]:
    return [e.name for e in report.swapped if e.now == NOW]


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "ElectraForMaskedLM"])
def test_a_model_computes_the_same_and_undo_restores_it(name: str, calls: list[float]) -> None:
    stock = small(name)
    model = copy.deepcopy(stock)
    report = torchweld.patch(model)
    assert len(of_blocks(report)) == 2 * LAYERS
    assert not report.left
    before = results(stock)
    for dtype, counted in ((torch.float32, 0), (torch.bfloat16, 2 * LAYERS)):
        results(model.to(dtype))
        assert len(calls) == counted  # one pass is no faster in training in float32 without dropout
        model.to(torch.float32)
        model.load_state_dict(stock.state_dict())
    with torch.no_grad():
        got = model(IDS, output_hidden_states=True)
        assert len(calls) == 4 * LAYERS
    close([got.logits, *got.hidden_states], [before[0], *before[2 : 3 + LAYERS]])
    close(results(model), before, 1e-3)
    report.undo()
    same(results(model), before)


def test_bfloat16_is_no_further_from_float64(calls: list[float]) -> None:
    stock = small()
    exact = results(copy.deepcopy(stock).double())
    stock = stock.bfloat16()
    model = copy.deepcopy(stock)
    torchweld.patch(model)

    assert distance(results(model), exact) < 1.1 * distance(results(stock), exact)
    assert len(calls) == 2 * LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_that_of_the_definition(dtype: torch.dtype, calls: list[float]) -> None:
    model = small(p=0.3).to(dtype).train()
    torchweld.patch(model)
    end = model.bert.encoder.layer[0].output
    torch.manual_seed(2)
    x, residual = torch.randn(2, 5, 48).to(dtype).requires_grad_(), torch.randn(2, 5, 32).to(dtype).requires_grad_()
    weights, seed = torch.randn(2, 5, 32).to(dtype), torch.random.get_rng_state()
    leaves = (x, residual, *end.parameters())
    got = end(x, residual)
    gradients = torch.autograd.grad(got, leaves, weights)
    assert calls == [0.3]
    torch.random.set_rng_state(seed)
    exact = copy.deepcopy(end).double()
    wide = tuple(t.detach().double().requires_grad_() for t in (x, residual))
    rest = ((32,), exact.LayerNorm.weight, exact.LayerNorm.bias, exact.LayerNorm.eps, 0.3)
    right = reference.add_layer_norm(exact.dense(wide[0]), wide[1], *rest, seed=draw_seed(x.device))[0]
    expected = torch.autograd.grad(right, (*wide, *exact.parameters()), weights.double())
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    for a, b in zip((got, *gradients), (right, *expected), strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_drops_the_same(reentrant: bool, calls: list[float]) -> None:
    model = small(p=0.3).train()
    torchweld.patch(model)
    before = results(model)
    assert calls == [0.3] * 2 * LAYERS
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    close(results(model), before)  # the first, reentrant run has no gradient: its GELU is torch's
    assert len(calls) == 6 * LAYERS


def test_hooks_see_the_calls(calls: list[float]) -> None:
    model, seen = small().eval(), []
    torchweld.patch(model)
    end = model.bert.encoder.layer[1].attention.output

    def hook(*_: Any) -> None:
        seen.append(1)

    with torch.no_grad():
        expected = model(IDS).logits
        for part in (end.LayerNorm, end.dropout):
            for register in (part.register_forward_hook, part.register_forward_pre_hook):
                calls.clear()
                handle = register(hook)
                torch.testing.assert_close(model(IDS).logits, expected)
                handle.remove()
                assert len(calls) == 2 * LAYERS - 1
        assert len(seen) == 4
        calls.clear()
        modules: list[torch.nn.Module] = []
        handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: modules.append(module))
        torch.testing.assert_close(model(IDS).logits, expected)
        handle.remove()
    assert not calls
    assert end.LayerNorm in modules
    assert end.dropout in modules


def test_other_parts_are_left_and_reported(calls: list[float]) -> None:
    class OwnNorm(torch.nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = small().eval()
    first, second = (layer.output for layer in model.bert.encoder.layer)
    first.LayerNorm = OwnNorm(32)
    handle = second.dropout.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        expected = model(IDS).logits
        report = torchweld.patch(model)
        reasons = {e.name: e.why for e in report.left}
        assert reasons["bert.encoder.layer.0.output"] == "its OwnNorm has hooks, or is no torch.nn.LayerNorm"
        assert reasons["bert.encoder.layer.1.output"] == "its Dropout has hooks, or is no torch.nn.Dropout"
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == 2 * LAYERS - 2
    handle.remove()


def test_a_part_that_is_replaced_later_is_called(calls: list[float]) -> None:
    model = small().eval()
    torchweld.patch(model)
    for layer in model.bert.encoder.layer:
        layer.output.LayerNorm = torch.nn.Identity()
    with torch.no_grad():
        got = model(IDS).logits
        twin = small().eval()
        for layer in twin.bert.encoder.layer:
            layer.output.LayerNorm = torch.nn.Identity()
        torch.testing.assert_close(got, twin(IDS).logits, rtol=1e-4, atol=1e-4)
    assert len(calls) == LAYERS


def test_copies_and_pickles_are_patched(calls: list[float]) -> None:
    model = small(p=0.3).train()
    torchweld.patch(model)
    before = results(model, hidden_states=False)  # whose hooks, transformers' own, cannot be pickled
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(results(twin, hidden_states=False), before)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert len(calls) == 6 * LAYERS


def test_generation_token_for_token(calls: list[float]) -> None:
    stock = small("BertLMHeadModel", is_decoder=True).eval()
    model = copy.deepcopy(stock)
    torchweld.patch(model)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **options), stock.generate(IDS, **options))
    assert len(calls) == 8 * 2 * LAYERS


def test_autocast_keeps_its_dtypes(calls: list[float]) -> None:
    stock = small()
    model = copy.deepcopy(stock)
    torchweld.patch(model, loss=False)
    with torch.autocast("cpu", torch.bfloat16):
        got, right = (m(IDS, output_hidden_states=True) for m in (model.eval(), stock.eval()))
        for a, b in zip((got.logits, *got.hidden_states), (right.logits, *right.hidden_states), strict=True):
            assert a.dtype is b.dtype
            torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)
        with torch.no_grad():
            model(IDS)
    assert len(calls) == 2 * LAYERS


def test_what_the_op_does_not_take_runs_as_before(calls: list[float]) -> None:
    """float64, a residual that is broadcast, and a class of tensors."""
    model = small(p=0.3).train()
    torchweld.patch(model)
    end = model.bert.encoder.layer[0].output
    x, residual = torch.randn(2, 5, 48), torch.randn(5, 32)
    end.dropout.p = 0.0
    dense = end.dense(x)
    torch.testing.assert_close(end(x, residual), end.LayerNorm(dense + residual))

    class Named(Tensor):
        pass

    assert type(end(x.as_subclass(Named), residual.expand(2, 5, 32))) is Named
    model.double()
    torch.testing.assert_close(end(x.double(), residual.double()), end.LayerNorm(end.dense(x.double()) + residual))
    assert not calls


def test_small_calls_without_dropout_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small().eval()
    torchweld.patch(model)
    end = model.bert.encoder.layer[0].output
    monkeypatch.setattr(ops, "add_layer_norm", None)
    with torch.no_grad():
        end(torch.randn(1, 1, 48), torch.randn(1, 1, 32))
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            end(torch.randn(1, 2048, 48), torch.randn(1, 2048, 32))


def test_norms_are_not_asked_for() -> None:
    report = torchweld.patch(small(), norms=False)
    assert not of_blocks(report)
    reasons = {e.name: e.why for e in report.left}
    assert reasons["bert.encoder.layer.0.output"] == "patch(..., norms=False)"


@pytest.mark.slow
def test_a_patched_model_compiles() -> None:
    model = small().eval()
    torchweld.patch(model)
    ids = IDS.repeat(1, 100)[:, :500]
    with torch.no_grad():
        expected = model(ids).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids).logits, expected, rtol=1e-4, atol=1e-5)
    end = model.bert.encoder.layer[0].output.train()
    end.dropout.p = 0.3
    x, residual = torch.randn(2, 5, 48, requires_grad=True), torch.randn(2, 5, 32, requires_grad=True)
    found = []
    for run in (end, torch.compile(end, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        out = run(x, residual)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), (x, residual))])
    close(found[1], found[0])
