"""patch: a part of a patched forward that runs again in the backward, compiled, or on another's attention."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import torchweld
from patch_models import WIDTH, Attention
from torchweld import ops

P = 0.5


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """The modules have a few hundred parameters."""
    torch.set_num_threads(1)


def helper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=P, is_causal=True)


def merge(heads: torch.Tensor) -> torch.Tensor:
    return heads.transpose(-2, -3).flatten(-2)


class Checkpointed(Attention):
    """Attention with dropout whose `how` is run by `run`, which may run it again."""

    def __init__(self, how: str, run: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.how, self.run, self.function = how, run, partial(F.scaled_dot_product_attention, dropout_p=P)

    def method(self, x: torch.Tensor) -> torch.Tensor:
        return merge(F.scaled_dot_product_attention(*self.heads(x), dropout_p=P))

    @staticmethod
    def static(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=P)

    def by_attribute(self, x: torch.Tensor) -> torch.Tensor:
        return merge(self.function(*self.heads(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        again = self.run
        return {
            "method": lambda: again(self.method, x),
            "static": lambda: merge(again(self.static, *self.heads(x))),
            "closure": lambda: again(lambda x: merge(helper(*self.heads(x))), x),
            "function": lambda: merge(again(helper, *self.heads(x))),
            "torch's own": lambda: merge(again(self.function, *self.heads(x))),
            "by attribute": lambda: again(self.by_attribute, x),
            "both": lambda: again(self.method, x) + self.method(x),
            "nested": lambda: again(
                lambda x: again(self.method, x) + again(lambda x: merge(helper(*self.heads(x))), x), x
            ),
        }[self.how]()


class Own(torch.autograd.Function):
    """A checkpoint as other libraries have it: an autograd function that runs another one again."""

    @staticmethod
    def forward(ctx: Any, function: Any, *args: torch.Tensor) -> torch.Tensor:
        ctx.function, ctx.state = function, torch.get_rng_state()
        ctx.save_for_backward(*args)
        with torch.no_grad():
            return function(*args)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        args = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.random.fork_rng(), torch.enable_grad():
            torch.set_rng_state(ctx.state)
            out = ctx.function(*args)
        torch.autograd.backward(out, grad)
        return None, *(x.grad for x in args)


def selective(function: Any, *args: torch.Tensor) -> torch.Tensor:
    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if "mm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


REENTRANT, FRAMES = (partial(checkpoint, use_reentrant=again) for again in (True, False))
OUTER = {"alone": lambda f, x: f(x), "in a reentrant": REENTRANT, "in a checkpoint": FRAMES}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of a checkpoint inside a reentrant one
@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize(
    ("run", "how"),
    [
        (run, how)
        for run in (REENTRANT, FRAMES, selective, Own.apply)
        for how in ("method", "static", "closure", "function", "torch's own", "by attribute", "both", "nested")
        if (run, how) != (selective, "nested")  # torch's own limit
    ],
)
def test_the_gradient_is_that_of_the_forward(run: Any, how: str, outer: str) -> None:
    """Of its dropout mask too: held to a difference of two forwards with the same seed."""
    torch.manual_seed(0)
    module, x, step = Checkpointed(how, run), torch.randn(2, 8, WIDTH), 1e-2 * torch.randn(2, 8, WIDTH)
    torchweld.patch(module)

    def total(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return OUTER[outer](module, x).double().sum()

    leaf = x.clone().requires_grad_()
    total(leaf).backward()
    assert leaf.grad is not None
    expected = (total((x + step).requires_grad_()) - total((x - step).requires_grad_())) / 2
    torch.testing.assert_close((leaf.grad.double() * step).sum(), expected.detach(), rtol=2e-2, atol=2e-3)


def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every call of our attention."""
    calls: list[int] = []
    right = ops.scaled_dot_product_attention
    monkeypatch.setattr(ops, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or right(*a, **k))
    return calls


@pytest.mark.parametrize("how", ["method", "static"])
def test_methods_of_the_module_keep_the_kernels_in_a_checkpoint(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, module = count(monkeypatch), Checkpointed(how, FRAMES)
    torchweld.patch(module)
    loss = module(torch.randn(2, 8, WIDTH, requires_grad=True)).sum()
    assert len(calls) == 1
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert len(calls) == 2 and module.qkv.weight.grad is not None


class Compiled(torch.nn.Module):
    """Checkpoints one part that is compiled, and attends beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled = torch.compile(self.part, backend="aot_eager", fullgraph=True)

    def part(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.compiled, x, use_reentrant=False) + F.scaled_dot_product_attention(x, x, x)


def test_a_compiled_part_of_a_patched_forward() -> None:
    x, found = torch.randn(2, 8, WIDTH, requires_grad=True), []
    for swap in (False, True):
        module = Compiled()
        if swap:
            torchweld.patch(module)
        out = module(x)
        found.append((out, *torch.autograd.grad(out.square().sum(), [x])))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


class Other(TorchFunctionMode):
    """Sees torch's calls of attention, and makes them its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return another(*args) if func is F.scaled_dot_product_attention else func(*args, **(kwargs or {}))


def another(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros_like(v)


@pytest.mark.parametrize("kind", ["attention", "mha", "layer"])
def test_attention_that_was_replaced_stays_so(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's `context_parallel` does; an attention that goes past it would see this rank's keys only."""
    layer = torch.nn.TransformerEncoderLayer(WIDTH, 2, 24, 0.0, batch_first=True)
    module = {"attention": Attention(), "mha": layer.self_attn, "layer": layer}[kind]
    x = torch.randn(2, 8, WIDTH)

    def run() -> torch.Tensor:
        return module(x, x, x, need_weights=False)[0] if kind == "mha" else module(x)

    monkeypatch.setattr(F, "scaled_dot_product_attention", another)
    expected = run()
    torchweld.patch(module)
    calls = count(monkeypatch)
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
    assert not calls
    monkeypatch.undo()
    assert not torch.allclose(run(), expected)


def test_a_mode_around_the_model_sees_attention_and_a_default_device_hides_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, x = Attention(), torch.randn(2, 8, WIDTH)
    torchweld.patch(module)
    calls = count(monkeypatch)
    with Other():
        assert not module(x).any()
    assert not calls
    with torch.device("cpu"):
        assert module(x).any()
    assert calls
