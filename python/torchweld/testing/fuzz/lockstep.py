"""A run of an optimizer beside torch's. The rule of exactness judges parameters and states after every event."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchweld import optim
from torchweld.testing.case import Tensors
from torchweld.testing.fuzz.trial import Skip, Trial
from torchweld.testing.parity import assert_parity

_SHAPES = ((5, 7), (7,), (), (2, 3, 4, 5), (0, 3), (131,))


class _Player:
    """One of three optimizers: torchweld's, torch's in the same dtype (float32 beside masters), torch's in float64."""

    def __init__(self, trial: Lockstep, cls: type[torch.optim.Optimizer], dtype: torch.dtype, ours: bool) -> None:
        self.trial, self.cls, self.dtype = trial, cls, dtype
        self.served: _Player = self  # the player whose masters say what a write changes
        self.options = dict(trial.options)
        limit = self.options.pop("max_grad_norm", None)
        self.limit = None if ours else limit
        if not ours:  # torch's fused kernels read gradients as if they lay like their parameters
            self.options = {"foreach": False} | self.options | {"fused": False}
        else:
            self.options |= {"max_grad_norm": limit} | ({"master_weights": True} if trial.masters else {})
        self.params = [torch.nn.Parameter(t.to(dtype)) for t in trial.draws("parameters", 0)]
        half = len(self.params) // 2
        self.optimizer = self.make([{"params": self.params[:half]}, {"params": self.params[half:], "lr": 0.01}])
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)

    def make(self, groups: Any) -> torch.optim.Optimizer:
        return self.cls(groups, **self.options)

    def again(self) -> torch.optim.Optimizer:
        """A new optimizer of the same parameters, without state."""
        return self.make([{"params": group["params"]} for group in self.optimizer.param_groups])

    def step(self, index: int, scale: float = 1.0, missing: int = 0, layout: str = "") -> None:
        self._set_grads(index, scale, missing, layout)
        self._clip()
        self.optimizer.step()

    def _set_grads(self, index: int, scale: float, missing: int = 0, layout: str = "") -> None:
        grads = self.trial.draws("gradients", index)
        grads += [torch.ones(n.shape) for n in self.params[len(grads) :]]
        for i, (p, grad) in enumerate(zip(self.params, grads, strict=True)):
            g = (grad * scale).to(self.trial.dtype).to(self.dtype)
            if layout == "strided" and g.dim() > 1:
                g = g.mT.contiguous().mT
            elif layout == "expanded":
                g = g.flatten()[:1].sum().expand(g.shape)
            p.grad = g if p.requires_grad and not (missing and i % 3 == index % 3) else None

    def _clip(self) -> None:
        if self.limit is not None:
            torch.nn.utils.clip_grad_norm_(self.params, self.limit)

    def scaled_step(self, index: int, overflow: bool) -> None:
        self.scaler.scale(torch.zeros(()))
        self._set_grads(index, self.scaler.get_scale())
        if overflow and self.params[-1].grad is not None:
            self.params[-1].grad.view(-1)[:1] = torch.inf
        if self.limit is not None:
            self.scaler.unscale_(self.optimizer)
            self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def write(self, index: int, how: str) -> None:
        values = [t.to(self.trial.dtype).to(self.dtype) for t in self.trial.draws("written", index)]
        for p, value, q in zip(self.params, values, self.served.params, strict=False):
            master = self.served.optimizer.state.get(q, {}).get("master_param")
            if master is not None:  # what a master rounds to would be no write: another number takes its place
                value = torch.where(value == master.to(self.trial.dtype).to(self.dtype), 3.0, value)  # noqa: PLW2901
            if how == "data":
                p.data = value
            elif how == "data in place":
                p.data.copy_(value)
            elif how == "dlpack":
                torch.utils.dlpack.from_dlpack(p.detach()).copy_(value)
            else:
                with torch.no_grad():
                    p.copy_(value)

    def tensors(self, beside: _Player) -> Tensors:
        """All parameters, and all states of each name, as one tensor each: states of what has one `beside` as well.

        A fused step makes them before it knows of an overflow; the others are not called then.
        """
        found = {"params": torch.cat([p.detach().flatten() for p in self.params])}
        names = dict.fromkeys(n for s in self.optimizer.state.values() for n, t in s.items() if isinstance(t, Tensor))
        for name in sorted(names):
            each = [
                s[name].flatten()
                for p, q in zip(self.params, beside.params, strict=True)
                if beside.optimizer.state.get(q)
                and name in (s := self.optimizer.state.get(p, {}))
                and s[name] is not None
            ]
            if each and name != "master_param":
                found[name] = torch.cat(each)
        return found


def _load(player: _Player, other: _Player) -> None:
    state = copy.deepcopy(other.optimizer.state_dict())
    player.optimizer = player.again()
    player.optimizer.load_state_dict(state)
    # The groups of a state have the options of its optimizer. The player keeps its own options.
    for group in player.optimizer.param_groups:
        group.update({name: player.options[name] for name in ("foreach", "fused") if name in player.options})


def _deepcopy(player: _Player, how: Callable[[Any], Any]) -> None:
    params, optimizer = how((player.params, player.optimizer))
    player.params, player.optimizer = params, optimizer


def _forget(player: _Player, index: int) -> None:
    player.optimizer.state.clear()
    if player.trial.masters:  # masters are then made from the parameters
        for p in player.params:
            p.data = p.data.to(player.trial.dtype).to(player.dtype)


def _freeze(player: _Player, index: int) -> None:
    for i, p in enumerate(player.params):
        p.requires_grad_(i % 4 != index % 4)
        p.grad = None


def _options(player: _Player, index: int) -> None:
    for group in player.optimizer.param_groups:
        changes = [("lr", group["lr"] * 0.5), ("weight_decay", 0.05), ("maximize", not group["maximize"])]
        name, value = changes[index % 3]
        group[name] = value


def _add_group(player: _Player, index: int) -> None:
    p = torch.nn.Parameter(torch.linspace(-1, 1, 9).to(player.trial.dtype).to(player.dtype))
    player.params.append(p)
    player.optimizer.add_param_group({"params": [p], "lr": 0.05})


def _closure(player: _Player, index: int) -> None:
    def closure() -> Tensor:
        player._set_grads(index, 1.0)
        player._clip()
        return torch.tensor(float(index))

    assert float(player.optimizer.step(closure)) == index  # type: ignore[arg-type]


Event = Callable[[_Player, int], None]
EVENTS: dict[str, Event] = {
    "step": lambda player, i: player.step(i),
    "some gradients": lambda player, i: player.step(i, missing=1),
    "no gradients": lambda player, i: (player.optimizer.zero_grad(), player.optimizer.step(), None)[-1],
    "small gradients": lambda player, i: player.step(i, 1e-4),
    "large gradients": lambda player, i: player.step(i, 100.0),
    "zero gradients": lambda player, i: player.step(i, 0.0),
    "strided gradients": lambda player, i: player.step(i, layout="strided"),
    "expanded gradients": lambda player, i: player.step(i, layout="expanded"),
    "closure": _closure,
    "scaler": lambda player, i: player.scaled_step(i, overflow=False),
    "overflow": lambda player, i: player.scaled_step(i, overflow=True),
    "options": _options,
    "add a group": _add_group,
    "freeze": _freeze,
    "write": lambda player, i: player.write(i, "copy"),
    "write data": lambda player, i: player.write(i, "data in place"),
    "replace data": lambda player, i: player.write(i, "data"),
    "write through dlpack": lambda player, i: player.write(i, "dlpack"),
    "save and load": lambda player, i: _load(player, player),
    "deepcopy": lambda player, i: _deepcopy(player, copy.deepcopy),
    "pickle": lambda player, i: _deepcopy(player, lambda both: pickle.loads(pickle.dumps(both))),
    "forget": _forget,
    "take torch's state": lambda player, i: None,  # see `check`
    "give torch the state": lambda player, i: None,
}


@dataclass(frozen=True, kw_only=True)
class Lockstep(Trial):
    """`events` by name, one after the other; `options` of the constructor, and `max_grad_norm`."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.float32
    masters: bool = False
    events: tuple[str, ...]
    seed: int

    def draws(self, what: str, index: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1000 * index + 10**6 * len(what))
        return [torch.randn(shape, generator=generator) for shape in _SHAPES]

    def check(self) -> None:
        stock = getattr(torch.optim, self.name)
        ours = _Player(self, getattr(optim, self.name), self.dtype, ours=True)
        theirs = _Player(self, stock, torch.float32 if self.masters else self.dtype, ours=False)
        exact = _Player(self, stock, torch.float64, ours=False)
        theirs.served = exact.served = ours
        for p in exact.params:
            p.data = p.data.to(self.dtype).double()
        for index, event in enumerate(self.events):
            try:
                for player in (theirs, exact):
                    EVENTS[event](player, index)
            except (RuntimeError, ValueError, TypeError) as error:
                raise Skip(str(error)) from error
            try:
                EVENTS[event](ours, index)
            except ValueError as error:  # of torch's GradScaler, unless a fused step does it, which a copy forgets
                if "Attempting to unscale FP16" in str(error):
                    raise Skip(str(error)) from error
                raise
            if event == "take torch's state" and not self.masters:
                _load(ours, theirs)
            elif event == "give torch the state" and not self.masters:
                _load(theirs, ours)
            self._compare(f"{event} ({index})", ours, theirs, exact)

    def _compare(self, what: str, ours: _Player, theirs: _Player, exact: _Player) -> None:
        found, expected, right = (player.tensors(theirs) for player in (ours, theirs, exact))
        if ours.scaler.get_scale() != theirs.scaler.get_scale():
            raise AssertionError(f"[{self.name}] case {what!r}, scale: misses the rule")
        for name in found.keys() - right.keys():  # made before the step knew of an overflow, and handed on since
            if bool(found.pop(name).any()):
                raise AssertionError(f"[{self.name}] case {what!r}, {name}: misses the rule")
        expected = {n: t.to(found[n].dtype) for n, t in expected.items() if n in found}
        # The factor of clipping is one number, rounded once or twice, and in all of the moments.
        clipped = any(name == "max_grad_norm" for name, _ in self.options)
        terms = {n: 2 * float(t.abs().amax()) for n, t in right.items() if clipped and n != "params" and t.numel()}
        # SGD's step may be far larger than what is left of the parameter, and is rounded before it is taken.
        if "momentum_buffer" in right:
            rate = max(group["lr"] for group in exact.optimizer.param_groups)
            terms["params"] = rate * float(right["momentum_buffer"].abs().amax())
        assert_parity(found, expected, right, op=self.name, case=what, terms=terms)
