"""adamw_, grad_norm and the optimizers on a GPU: exactness, memory, determinism, no host sync, graph capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adamw_lists import (
    BF16,
    DTYPES,
    F32,
    F64,
    GRAD,
    HYPER,
    PARAM,
    SHAPES,
    STEP,
    VARIANTS,
    clone,
    hold_to_float64,
    make,
    same_bits,
    worst,
)
from leaves import gradient
from optim_parameters import parameters, run, set_grads
from torchweld import ops, optim, reference
from torchweld.testing import Case, Oracle, cases

pytestmark = pytest.mark.cuda

CHUNK = 16384  # elements of one thread block
# Sizes around a chunk, and more tensors than one launch of fill_table carries.
LONG = [*SHAPES, (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), *[(1 + i % 9,) for i in range(800)], (3 * CHUNK + 5,)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_steps_are_as_near_to_float64_as_torch_is(dtypes: tuple[torch.dtype, ...], variant: str) -> None:
    hold_to_float64(LONG, dtypes, variant, "cuda")


def test_more_chunks_than_partial_sums() -> None:
    ours = make([(1025 * CHUNK + 3,), (7,)], device="cuda")
    exact = clone(ours, F64)
    norm, expected = (
        f(*each, **HYPER, max_grad_norm=1.0) for f, each in ((ops.adamw_, ours), (reference.adamw_, exact))
    )
    assert norm is not None and expected is not None
    assert abs(norm.item() - expected.item()) <= 1e-6 * expected.item()
    assert worst(ours[PARAM], exact[PARAM]) <= 2 * torch.finfo(F32).eps * exact[PARAM][0].abs().max().item()


@pytest.mark.parametrize("offset", range(1, 8))
def test_unaligned_memory_gives_the_same_bits(offset: int) -> None:
    for dtypes in ((F32, F32, F32), (BF16, BF16, F32)):
        aligned, shifted = (make(SHAPES, *dtypes, offset=o, device="cuda") for o in (0, offset))
        for each in (aligned, shifted):
            ops.adamw_(*each, **HYPER, amsgrad=True)
        assert same_bits(aligned, shifted)


def test_nothing_is_written_outside_the_tensors() -> None:
    guard = 40
    for dtype in (F32, BF16):
        lists = make([*SHAPES, (CHUNK + 1,)], dtype, dtype, dtype, device="cuda")
        memory: list[torch.Tensor] = []
        inside: list[Any] = []
        for each in lists[:STEP]:
            blocks = [torch.full((t.numel() + 2 * guard,), torch.nan, dtype=dtype, device="cuda") for t in each]
            inside.append(
                [b[guard : guard + t.numel()].view(t.shape).copy_(t) for b, t in zip(blocks, each, strict=True)]
            )
            memory += blocks
        inside.append(lists[STEP])
        ops.adamw_(*inside, **HYPER, amsgrad=True, grad_scale=torch.tensor(2.0, device="cuda"))
        for block in memory:
            assert block[:guard].isnan().all() and block[-guard:].isnan().all()
            assert not block[guard:-guard].isnan().any()


def test_same_bits_on_every_run() -> None:
    runs = [make(LONG, device="cuda") for _ in range(4)]
    norms = [ops.adamw_(*each, **HYPER, max_grad_norm=1.0) for each in runs]
    assert all(n is not None and norms[0] is not None and torch.equal(norms[0], n) for n in norms)
    assert all(same_bits(runs[0], each) for each in runs)


def test_overflow_moves_nothing_and_scaling_is_undone() -> None:
    start = make(LONG, device="cuda")
    one, scale = torch.tensor(1.0, device="cuda"), torch.tensor(1024.0, device="cuda")
    lists = clone(start)
    ops.adamw_(*lists, **HYPER, amsgrad=True, grad_scale=scale, found_inf=one)
    assert same_bits(lists, start)
    scaled = clone(start)
    scaled[GRAD] = [g * 1024 for g in scaled[GRAD]]
    a = ops.adamw_(*lists, **HYPER, max_grad_norm=1.0)
    b = ops.adamw_(*scaled, **HYPER, max_grad_norm=1.0, grad_scale=scale, found_inf=0 * one)
    assert a is not None and b is not None and torch.equal(a, b) and same_bits(lists, scaled)


def test_steps_on_the_host_are_refused_by_name() -> None:
    lists = make([(5,), (3,)], device="cuda")
    lists[STEP][1] = lists[STEP][1].cpu()
    with pytest.raises(ValueError, match=r"steps\[1\]: expected a tensor on cuda:0, but got cpu; move it with .to\(\)"):
        ops.adamw_(*lists, **HYPER)


def on_gpu() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().cuda()) for p in parameters()]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}, {"foreach": True}], ids=str)
def test_optimizer_agrees_with_torchs(options: dict[str, Any]) -> None:
    mine, its = on_gpu(), on_gpu()
    torch.testing.assert_close(run(optim.AdamW(mine, **options), mine), run(torch.optim.AdamW(its), its))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_does_not_wait_for_the_gpu() -> None:
    params = on_gpu()
    optimizer = optim.AdamW(params, max_grad_norm=0.5)
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(torch.zeros((), device="cuda"))
    run(optimizer, params)  # the first step makes the state
    set_grads(params, 3)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scaler.step(optimizer)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert optimizer.grad_norm is not None and optimizer.grad_norm.is_cuda


def test_a_captured_step_replays() -> None:
    captured, eager = on_gpu(), on_gpu()
    lr = torch.tensor(1e-2, device="cuda")
    a = optim.AdamW(captured, lr=lr, capturable=True, max_grad_norm=0.5)
    b = torch.optim.AdamW(eager, lr=1e-2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(a, captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    for seed in range(5):
        set_grads(eager, seed)
        if seed >= 3:
            lr.fill_(2e-2)
            b.param_groups[0]["lr"] = 2e-2
            for p, q in zip(captured[:-1], eager[:-1], strict=True):
                gradient(p).copy_(gradient(q))
            graph.replay()
        torch.nn.utils.clip_grad_norm_(eager, 0.5)
        b.step()
    torch.testing.assert_close(captured, eager)


@pytest.mark.parametrize(("case", "dtype"), [(c, d) for op in ("adamw", "sgd") for c in cases(op) for d in c.dtypes])
def test_every_case(case: Case, dtype: torch.dtype) -> None:
    Oracle(case, dtype, "cuda").check()


def test_stochastic_rounding_has_the_bits_of_the_cpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        lists = make(LONG, BF16, BF16, F32, device=device)
        for each in lists[GRAD:STEP]:
            for t in each:
                t.zero_()  # the decay alone moves: one product, the same everywhere
        for _ in range(2):
            ops.adamw_(*lists, **HYPER, rounding_seed=2**40 + 3)
        found.append([p.cpu() for p in lists[PARAM]])
    assert same_bits([found[0]], [found[1]])


@pytest.mark.parametrize("options", [{}, {"master_weights": True}, {"stochastic_rounding": True}], ids=str)
def test_offloaded_steps_are_those_of_the_cpu(options: dict[str, Any]) -> None:
    there, here = on_gpu(), parameters()
    for params in (there, here):
        for p in params:
            p.data = p.data.to(BF16 if options else F32)
    a, b = optim.AdamW(there, offload="cpu", **options), optim.AdamW(here, **options)
    found, expected = run(a, there), run(b, here)
    assert all(torch.equal(p.cpu(), q) for p, q in zip(found, expected, strict=True))
    assert all(t.is_cpu for state in a.state.values() for t in state.values())
