"""What the optimizers here share: torch's in all but `step`, which is one call of a kernel for a list of parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchweld import backend
from torchweld._torch import check_graph_capture, without_dynamo
from torchweld.optim import offload, sharding
from torchweld.optim.state import Group, KeptState, State

Lists = dict[str, list[Tensor]]  # by what they hold: "param", "grad", then the names of the state


@dataclass
class Work:
    """Parameters of one group on one device, with what belongs to each: one call of a kernel."""

    group: Group
    params: list[Tensor]  # as the user sees them
    lists: Lists  # as the kernel sees them: shards of DTensors, complex tensors as real ones
    shardings: list[sharding.Sharding | None]  # by parameter: how a DTensor is spread over processes; None: it is not
    fresh: bool  # whether their state is new, where that matters to the optimizer


class FusedOptimizer(KeptState):
    """Mixed in before torch's optimizer `_torch`, whose constructor, state_dict and behaviour it keeps."""

    _torch: ClassVar[type[torch.optim.Optimizer]]
    _whole: ClassVar[Callable[..., list[Tensor] | None]]  # backend.whole_call of a step
    _grad_norm: Tensor | None = None
    _mirrors: offload.Mirrors | None = None

    # ---- What differs from optimizer to optimizer

    @abstractmethod
    def _unserved(self, group: Group) -> str | None:
        """Why torch's own step is to serve this group; None if the kernels do."""

    @abstractmethod
    def _state_names(self, group: Group) -> tuple[str, ...]:
        """The tensors that every parameter of this group has in its state."""

    @abstractmethod
    def _init_state(self, group: Group, param: Tensor, state: State) -> None:
        """Fills the state of a parameter that has none yet, as torch does."""

    @abstractmethod
    def _update(self, work: Work, **scalars: Any) -> None:
        """One step; the scalars are max_grad_norm, grad_norm, grad_scale and found_inf of ops.adamw_."""

    def _sparse(self) -> str:
        """What a sparse gradient means: why torch's own step is to serve it, or an error."""
        return "sparse gradients"

    @property
    def grad_norm(self) -> Tensor | None:
        """Global norm of the last step's gradients before clipping, a scalar tensor; None where nothing is clipped."""
        return self._grad_norm

    # ---- Step

    @without_dynamo  # one kernel already: torch.compile would see through to torch's own loop instead
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the loss of `closure`, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_graph_capture(self)
        if self._whole_step():
            return loss
        with torch.no_grad():
            works = self._gather()
            if not isinstance(works, str):
                self._fused_step(works)
                return loss
            if beyond := self._beyond_torch():
                raise RuntimeError(f"[{type(self).__name__}] {beyond} cannot serve {works}; torch's own step would")
            device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
            backend.choose(type(self).__name__, device, f"{works} (torch's own step does)")
            serve = self._prepare_for_torch()
        if serve:
            self._torch_step()
        return loss

    def _whole_step(self) -> bool:
        """A common step in one crossing into C++. False: this step is not common, and nothing has changed."""
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            return False
        written = self._whole(self.param_groups, self.state, self.defaults)
        if written is None:
            return False
        torch.autograd.graph.increment_version(written)
        self._grad_norm = None
        return True

    def _gather(self) -> list[Work] | str:
        """All there is to do; or why torch's own step is to do it, which then finds the state as it was."""
        found = []
        beyond = self._beyond_torch()
        for group in self.param_groups:
            if reason := self._unserved(group):
                return reason
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            if any(g.is_sparse for g in grads):
                return self._sparse()
            devices = [p.device for p in params]
            for device in set() if beyond else set(devices):
                if device.type not in ("cpu", "cuda"):
                    return f"parameters on {device.type!r}"
                if reason := backend.unavailable(device.type):
                    return reason
            if reason := sharding.unserved(params):
                return reason
            found.append((group, params, grads, devices))
        return [work for each in found for work in self._works(*each)]

    def _works(
        self, group: Group, params: list[Tensor], grads: list[Tensor], devices: list[torch.device]
    ) -> Iterator[Work]:
        if any_complex := any(map(Tensor.is_complex, params)):
            grads = [_settled_gradient(p) for p in params]
        lists: Lists = {"param": params, "grad": grads}
        fresh = self._add_state(group, params, lists)
        keys: list[Any] = devices
        if fresh and group.get("dampening"):
            keys = list(zip(keys, fresh, strict=True))
        if self._option(group, "master_weights"):
            lists["master"] = self._masters(params)
            keys = list(zip(keys, (m is not p for m, p in zip(lists["master"], params, strict=True)), strict=True))
        for first, chosen in _split(lists, keys):
            if "master" in chosen and chosen["master"][0] is chosen["param"][0]:
                del chosen["master"]
            owners = list(chosen["param"])
            shardings = sharding.localise(chosen)
            real = {name: _real(each) for name, each in chosen.items()} if any_complex else chosen
            yield Work(group, owners, real, shardings, bool(fresh) and fresh[first])

    def _add_state(self, group: Group, params: list[Tensor], lists: Lists) -> list[bool]:
        """Adds the state to the lists, making what is missing; by parameter, whether it was. Nothing was: empty."""
        names = self._state_names(group)
        if not names:
            return []
        states = [self.state[p] for p in params]
        fresh = [s.get(names[0]) is None for s in states]
        made = any(fresh)
        if made:
            for p, state, new in zip(params, states, fresh, strict=True):
                if new:
                    self._init_state(group, p, state)
        lists |= {name: [s.get(name) for s in states] for name in names}
        return fresh if made else []

    def _fused_step(self, works: list[Work]) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        norm = None
        if any(self._option(work.group, "max_grad_norm") is not None for work in works):
            grads = [(g, s) for work in works for g, s in zip(work.lists["grad"], work.shardings, strict=True)]
            norm = sharding.global_norm(grads, grad_scale)
        self._grad_norm = norm
        for work in works:
            scalars = {"grad_norm": norm, "grad_scale": grad_scale, "found_inf": found_inf}
            if self.defaults["offload"] is not None and offload.is_away(work.lists["param"][0]):
                self._mirrors = self._mirrors or offload.Mirrors()
                here = partial(self._step_here, work)
                self._mirrors.step(work.params, work.lists, scalars, self._option(work.group, "zero_grads"), here)
            else:
                self._step_here(work, work.lists, scalars)
            # The kernels count the versions of what they write to; a DTensor is a tensor around that.
            wrapped = [p for p, s in zip(work.params, work.shardings, strict=True) if s is not None]
            torch.autograd.graph.increment_version(wrapped)

    def _step_here(self, work: Work, lists: Lists, scalars: dict[str, Tensor | None]) -> None:
        """One call of a kernel, on the device where `lists` are."""
        device = lists["param"][0].device
        here = {n: None if t is None else t.to(device, non_blocking=device.type != "cpu") for n, t in scalars.items()}
        options = {name: self._option(work.group, name) for name in ("max_grad_norm", "zero_grads")}
        self._update(Work(work.group, work.params, lists, work.shardings, work.fresh), **here, **options)

    # ---- Where torch's own step serves

    def _torch_step(self) -> None:
        step: Any = self._torch.step
        # Without the hooks that torch wraps around it: ours has them already.
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)

    def _prepare_for_torch(self) -> bool:
        """Unscales and clips the gradients in place, for torch's own step. False: overflow, there is to be no step."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None:
            if float(found_inf):
                return False
            self.found_inf = None
        if grad_scale is not None:
            for grad in grads:
                grad.div_(grad_scale.to(grad.device))
            self.grad_scale = None
        self._grad_norm = None
        limits = [self._option(group, "max_grad_norm") for group in self.param_groups]
        if grads and any(limit is not None for limit in limits):
            self._grad_norm = norm = torch.nn.utils.get_total_norm(grads)
            for group, limit in zip(self.param_groups, limits, strict=True):
                if limit is not None:
                    torch.nn.utils.clip_grads_with_norm_(group["params"], limit, norm)
        return True


def _split(lists: Lists, keys: list[Any]) -> Iterator[tuple[int, Lists]]:
    """The lists, split by a key of each parameter; with the index of the first parameter of each part."""
    indices: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        indices.setdefault(key, []).append(i)
    for chosen in indices.values():
        whole = len(indices) == 1
        yield chosen[0], lists if whole else {n: [each[i] for i in chosen] for n, each in lists.items()}


def _settled_gradient(param: Tensor) -> Tensor:
    """The gradient, conjugated in memory if it was so lazily: of that there is no view of real numbers."""
    assert param.grad is not None
    if param.grad.is_conj():
        param.grad = param.grad.resolve_conj()
    return param.grad


def _real(tensors: list[Tensor]) -> list[Tensor]:
    """Complex tensors as real ones of twice the elements, as torch's optimizers see them."""
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
