"""Models spread over two processes by layers, beside one process in float64, step by step, by the rule of exactness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchweld
from gloo_processes import in_processes, needs_gloo
from torchweld import optim
from torchweld.models import GPT2, gpt2, gpt3, stock
from torchweld.testing.parity import assert_parity

pytestmark = [needs_gloo, pytest.mark.slow]
SMALL = replace(gpt2.CONFIGS["tiny"], n_positions=24, vocab_size=97)
BANDED = replace(gpt3.CONFIGS["tiny"], n_positions=24, vocab_size=97, window=5)


def curve(model: nn.Module, loss: Callable[..., Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The losses of a few steps, and the norms of the gradients."""
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, max_grad_norm=0.5)
    losses, norms = [], []
    for step in range(3):
        tokens = torch.randint(97, (4, 25), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        found = loss(tokens)
        found.backward()
        optimizer.step()
        losses.append(_whole(found.detach()).to(dtype))
        norms.append(_whole(optimizer.grad_norm).to(dtype))
    return {"losses": torch.stack(losses), "norms": torch.stack(norms)}


def _whole(t: Any) -> Tensor:
    found: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return found


def decoders(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

    from torchweld.distributed import full_parameter, local_parameter, tensor_parallel  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (2,))

    def model(kind: Any, config: Any, ops: Any = torchweld.ops) -> GPT2:
        torch.manual_seed(0)
        made: GPT2 = kind(config, ops)
        return made

    def losses(of: GPT2) -> Callable[[Tensor], Any]:
        return lambda tokens: of.loss(tokens[:, :-1], tokens[:, 1:])

    for kind, config in ((gpt2.GPT2, SMALL), (gpt3.GPT3, BANDED)):
        theirs, exact = model(kind, config, stock), model(kind, config).double()
        right = curve(theirs, losses(theirs)), curve(exact, losses(exact), torch.float64)
        for sequence in (True, False):
            ours = tensor_parallel(model(kind, config), mesh, sequence=sequence)
            assert isinstance(ours, GPT2)
            assert_parity(curve(ours, losses(ours)), *right, op=kind.__name__, case=f"sequence={sequence}")
            for name, p in ours.named_parameters():
                whole = full_parameter(ours, name, p.detach())
                torch.testing.assert_close(whole, exact.get_parameter(name).float(), rtol=1e-4, atol=1e-5)
                again: Any = local_parameter(ours, name, p, whole)
                assert again.placements == p.placements  # type: ignore[attr-defined]
                assert torch.equal(again.to_local(), p.detach().to_local())  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"\[tensor_parallel\] mesh: expected a number of devices that divides"):
        tensor_parallel(model(gpt2.GPT2, replace(SMALL, n_embd=63, n_head=3)), mesh)
    with pytest.raises(RuntimeError, match=r"\[tensor_parallel\] model: expected a GPT2 or GPT3 of torchweld.models"):
        tensor_parallel(nn.Linear(2, 2), mesh)
    with pytest.raises(RuntimeError, match=r"mesh: expected one dimension, over which layers are spread, but got 2"):
        tensor_parallel(model(gpt2.GPT2, SMALL), init_device_mesh("cpu", (2, 1)))


def llama(rank: int, folder: str) -> None:
    """patch() before and after."""
    transformers = pytest.importorskip("transformers")
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

    from torchweld.distributed import tensor_parallel  # noqa: PLC0415

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    mesh = init_device_mesh("cpu", (2,))

    def model() -> Any:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)

    def losses(of: Any) -> Callable[[Tensor], Any]:
        return lambda tokens: of(tokens, labels=tokens).loss

    theirs, exact = model(), model().double()
    right = curve(theirs, losses(theirs)), curve(exact, losses(exact), torch.float64)
    for before in (True, False):
        ours = model()
        if before:
            torchweld.patch(ours)
        tensor_parallel(ours, mesh)
        if not before:
            torchweld.patch(ours)
        assert_parity(curve(ours, losses(ours)), *right, op="Llama", case=f"before={before}")
    config.num_key_value_heads, config.num_attention_heads = 1, 4
    with pytest.raises(RuntimeError, match="divides the model's 1 key heads, but got 2"):
        tensor_parallel(model(), mesh)


def both(rank: int, folder: str) -> None:
    decoders(rank, folder)
    llama(rank, folder)


def test_plans() -> None:
    in_processes(both, 2)
