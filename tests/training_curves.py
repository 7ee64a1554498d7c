"""A few steps of a model, in one process or spread over several: losses, norms and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchweld import optim

Loss = Callable[[torch.Generator], Any]  # of a batch that the generator draws


def curve(model: nn.Module, loss: Loss, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The losses of a few steps, the norms of the gradients, and all gradients of the first step."""
    from torchweld.distributed import full_parameter  # noqa: PLC0415  (it needs torch.distributed)

    optimizer = optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, max_grad_norm=0.5)
    losses, norms, first = [], [], torch.empty(0)
    for step in range(3):
        optimizer.zero_grad()
        found = loss(torch.Generator().manual_seed(step))
        found.backward()
        if step == 0:
            grads = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
            first = torch.cat([full_parameter(model, n, grad).flatten() for n, grad in grads])
        optimizer.step()
        losses.append(whole(found.detach()).to(dtype))
        norms.append(whole(optimizer.grad_norm).to(dtype))
    return {"losses": torch.stack(losses), "norms": torch.stack(norms), "gradients": first.to(dtype)}


def whole(t: Any) -> Tensor:
    """Of a DTensor."""
    found: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return found


def check_parameters(model: nn.Module, exact: nn.Module) -> None:
    """After the same steps those of a spread model are those of `exact`; and what was whole finds its way back."""
    from torchweld.distributed import full_parameter, local_parameter, ordered_parameter  # noqa: PLC0415

    for name, p in model.named_parameters():
        found = full_parameter(model, name, p.detach())
        right = exact.get_parameter(name).float()
        torch.testing.assert_close({name: found}, {name: right}, rtol=1e-4, atol=1e-5)
        again: Any = local_parameter(model, name, p, found)
        ordered = whole(ordered_parameter(model, name, p.detach()))
        assert torch.equal(ordered, found), name
        if hasattr(p, "placements"):
            assert again.placements == p.placements
            assert torch.equal(again.to_local(), p.detach().to_local())  # type: ignore[attr-defined]
