"""The CUDA kernels of adamw_, sgd_ and grad_norm on the emulated GPU (tests/emulation): edges and long lists."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from torchweld import ops, reference, use_backend

CHUNK = 16384  # elements of one thread block


@pytest.fixture
def kernels(emulated: ModuleType) -> ModuleType:
    return emulated


def tensors(sizes: tuple[int, ...], seed: int = 0) -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = {n: [torch.randn(s, generator=generator) for s in sizes] for n in ("params", "grads", "exp_avgs")}
    made["exp_avg_sqs"] = [torch.rand(s, generator=generator) for s in sizes]
    return made | {"max_exp_avg_sqs": [], "steps": [torch.full((), 4.0) for _ in sizes]}


OPTIONS: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.usefixtures("kernels")
def test_chunks_meet_without_gap_or_overlap() -> None:
    """Empty and tiny tensors lie between tensors that end just before, at and just after a chunk of a thread block."""
    sizes = (0, CHUNK - 1, 0, 1, CHUNK, 3, CHUNK + 1, 0, 2 * CHUNK + 5, 7)
    ours, exact = tensors(sizes), tensors(sizes)
    ops.adamw_(*ours.values(), **OPTIONS)
    reference.adamw_(*exact.values(), **OPTIONS)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        for got, expected in zip(ours[name], exact[name], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_any_number_of_tensors(kernels: ModuleType) -> None:
    """More tensors than the arguments of one launch hold, clipped, with threads in order and in random order.

    The norm's thousand blocks take seconds here, so the cases that clip are left to this test.
    """
    sizes = tuple(1 + i % 5 for i in range(700))
    expected = tensors(sizes)
    reference.adamw_(*expected.values(), **OPTIONS, max_grad_norm=3.0)
    results = []
    for seed in (0, 1):
        kernels.set_machine(seed=seed)
        ours = tensors(sizes)
        norm = ops.adamw_(*ours.values(), **OPTIONS, max_grad_norm=3.0)
        assert norm is not None
        results.append([*ours["params"], *ours["exp_avgs"], norm])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for got, one in zip(results[0], expected["params"], strict=False):
        torch.testing.assert_close(got, one, rtol=1e-5, atol=1e-6)
    exact = torch.cat([g.double() for g in expected["grads"]]).norm()
    torch.testing.assert_close(results[0][-1].double(), exact, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("kernels")
def test_overflow_moves_nothing() -> None:
    ours, before = tensors((5, 300)), tensors((5, 300))
    ops.adamw_(*ours.values(), **OPTIONS, grad_scale=torch.tensor(2.0), found_inf=torch.tensor(1.0))
    for name, values in before.items():
        assert all(torch.equal(a, b) for a, b in zip(ours[name], values, strict=True))


@pytest.mark.usefixtures("kernels")
def test_scaled_gradients_are_stored_unscaled() -> None:
    ours, plain = tensors((5, 300)), tensors((5, 300))
    for grad in ours["grads"]:
        grad.mul_(8.0)
    ops.adamw_(*ours.values(), **OPTIONS, grad_scale=torch.tensor(8.0))
    ops.adamw_(*plain.values(), **OPTIONS)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        assert all(torch.equal(a, b) for a, b in zip(ours[name], plain[name], strict=True))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.usefixtures("kernels")
def test_stochastic_rounding_has_the_references_bits(offset: int) -> None:
    """Vectors and single elements, at the edges of chunks. Only the decay moves the parameters, so bits are equal."""
    sizes = (CHUNK + 11, 0, 3, 700)
    found = []
    for backend_name in ("cpu", "reference"):
        lists = tensors(sizes)
        narrow = [torch.zeros(offset + p.numel(), dtype=torch.bfloat16)[offset:].copy_(p) for p in lists["params"]]
        lists["params"], lists["grads"] = narrow, [torch.zeros_like(p) for p in narrow]
        for name in ("exp_avgs", "exp_avg_sqs"):
            lists[name] = [torch.zeros(p.shape) for p in narrow]
        with use_backend(backend_name):
            ops.adamw_(*lists.values(), **OPTIONS, rounding_seed=2**35 + 1)
        found.append(narrow)
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.usefixtures("kernels")
def test_a_step_starts_from_what_others_wrote(offset: int, seed: int | None) -> None:
    """Vectors and single elements. Every third is overwritten. Only the decay moves the others, so bits are equal."""
    sizes = (CHUNK + 11, 0, 3, 700)
    found = []
    for backend_name in ("cpu", "reference"):
        masters = tensors(sizes)["params"]
        params = [torch.zeros(offset + m.numel(), dtype=torch.bfloat16)[offset:].copy_(m) for m in masters]
        for p in params:
            p[::3] = 3.0
            p[::21] = -0.0
        zeros = [[torch.zeros(m.shape) for m in masters] for _ in range(3)]
        with use_backend(backend_name):
            steps = [torch.zeros(()) for _ in masters]
            lists: list[Any] = [params, *zeros, [], steps]
            ops.adamw_(*lists, **OPTIONS, masters=masters, rounding_seed=seed)
        assert all((m[::3][1:2] - 3.0).abs().max() < 0.1 for m in masters if m.numel() > 3)
        found.append([*params, *masters])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


@pytest.mark.usefixtures("kernels")
def test_gradients_are_zeroed_also_after_an_overflow() -> None:
    for found_inf in (0.0, 1.0):
        ours, plain = tensors((5, 300)), tensors((5, 300))
        for lists in (ours, plain):
            lists["grads"][1] = lists["grads"][1].bfloat16()
            lists["params"][1] = lists["params"][1].bfloat16()
        ops.adamw_(*ours.values(), **OPTIONS, zero_grads=True, found_inf=torch.tensor(found_inf))
        ops.adamw_(*plain.values(), **OPTIONS, found_inf=torch.tensor(found_inf))
        assert not any(g.any() for g in ours["grads"])
        for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
            assert all(torch.equal(a, b) for a, b in zip(ours[name], plain[name], strict=True))


@pytest.mark.usefixtures("kernels")
def test_sgd_reads_its_rate_on_the_device_and_dampens_from_the_second_step() -> None:
    ours, exact = (list(tensors((5, CHUNK + 3)).values())[:3] for _ in range(2))
    options: dict[str, Any] = {
        "lr": torch.tensor(0.1),
        "momentum": 0.9,
        "dampening": 0.5,
        "weight_decay": 0.1,
        "nesterov": False,
    }
    for first in (True, False):
        ops.sgd_(*ours, **options, first_step=first)
        reference.sgd_(*exact, **options, first_step=first)
    torch.testing.assert_close(ours, exact)
