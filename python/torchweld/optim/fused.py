"""What the optimizers here share: torch's in all but `step`, which is one call of a kernel for a list of parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchweld import backend
from torchweld.optim import sharding

Group = dict[str, Any]
Lists = dict[str, list[Tensor]]  # by what they hold: "param", "grad", then the names of the state


@dataclass
class Work:
    """The parameters of one group on one device, with what belongs to each: one call of a kernel."""

    group: Group
    params: list[Tensor]  # as the user sees them
    lists: Lists  # as the kernel sees them: shards of DTensors, complex tensors as real ones
    shardings: list[sharding.Sharding | None]  # by parameter: how a DTensor is spread over processes; None: it is not


class FusedOptimizer(torch.optim.Optimizer):
    """Mixed in before torch's optimizer `_torch`, whose constructor, state_dict and behaviour it keeps."""

    _torch: ClassVar[type[torch.optim.Optimizer]]
    # GradScaler hands its scale and its verdict to step(), as `grad_scale` and `found_inf`.
    _step_supports_amp_scaling = True
    _grad_norm: Tensor | None = None

    # ---- What differs from optimizer to optimizer

    @abstractmethod
    def _unserved(self, group: Group) -> str | None:
        """Why torch's own step is to serve this group; None if the kernels do."""

    @abstractmethod
    def _state_names(self, group: Group) -> tuple[str, ...]:
        """The tensors that every parameter of this group has in its state."""

    @abstractmethod
    def _init_state(self, group: Group, param: Tensor, state: dict[str, Tensor]) -> None:
        """Fills the state of a parameter that has none yet, as torch does."""

    @abstractmethod
    def _update(self, work: Work, **scalars: Tensor | float | None) -> None:
        """One step; the scalars are max_grad_norm, grad_norm, grad_scale and found_inf of ops.adamw_."""

    def _sparse(self) -> str:
        """What a sparse gradient means: why torch's own step is to serve it, or an error."""
        return "sparse gradients"

    # ---- Options

    def _add_options(self, max_grad_norm: float | None) -> None:
        """Adds what torch's constructor does not know to the defaults and the groups."""
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm}; expected a number above 0, or None")
        self.defaults["max_grad_norm"] = max_grad_norm
        for group in self.param_groups:
            group.setdefault("max_grad_norm", max_grad_norm)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint of torch's optimizer does not know it
            group.setdefault("max_grad_norm", self.defaults.get("max_grad_norm"))

    @property
    def grad_norm(self) -> Tensor | None:
        """Global norm of the last step's gradients before clipping, a scalar tensor; None where nothing is clipped."""
        return self._grad_norm

    # ---- Step

    @torch._compile._disable_dynamo  # one kernel already: torch.compile would see through to torch's own loop instead
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the loss of `closure`, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Refuses a graph capture under capturable=False; older torch has it under the second name.
        check = getattr(self, "_accelerator_graph_capture_health_check", None) or self._cuda_graph_capture_health_check
        check()
        with torch.no_grad():
            works = self._gather()
            if not isinstance(works, str):
                self._fused_step(works)
                return loss
            device = self.param_groups[0]["params"][0].device
            backend.choose(type(self).__name__, device, f"{works} (torch's own step does)")
            serve = self._prepare_for_torch()
        if serve:
            self._torch_step()
        return loss

    def _gather(self) -> list[Work] | str:
        """All there is to do; or why torch's own step is to do it."""
        works: list[Work] = []
        for group in self.param_groups:
            if reason := self._unserved(group):
                return reason
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            if any(g.is_sparse for g in grads):
                return self._sparse()
            lists: Lists = {"param": params, "grad": grads}
            if names := self._state_names(group):
                states = [self.state[p] for p in params]
                for p, state in zip(params, states, strict=True):
                    if not state:
                        self._init_state(group, p, state)
                lists |= {name: [s[name] for s in states] for name in names}
            for device, chosen in _split(lists, [p.device for p in params]):
                if device.type not in ("cpu", "cuda"):
                    return f"parameters on {device.type!r}"
                if reason := backend.unavailable(device.type):
                    return reason
                owners = list(chosen["param"])
                found = sharding.localise(chosen)
                if isinstance(found, str):
                    return found
                works.append(Work(group, owners, {name: _real(each) for name, each in chosen.items()}, found))
        return works

    def _fused_step(self, works: list[Work]) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        norm = None
        if any(work.group["max_grad_norm"] is not None for work in works):
            grads = [(g, s) for work in works for g, s in zip(work.lists["grad"], work.shardings, strict=True)]
            norm = sharding.global_norm(grads, grad_scale)
        self._grad_norm = norm
        for work in works:
            self._update(
                work,
                max_grad_norm=work.group["max_grad_norm"],
                grad_norm=None if norm is None else norm.to(work.lists["param"][0].device, non_blocking=True),
                grad_scale=grad_scale,
                found_inf=found_inf,
            )
            # The kernels count the versions of what they write to; a DTensor is a tensor around that.
            wrapped = [p for p, s in zip(work.params, work.shardings, strict=True) if s is not None]
            torch.autograd.graph.increment_version(wrapped)

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
        if grads and any(group["max_grad_norm"] is not None for group in self.param_groups):
            self._grad_norm = norm = torch.nn.utils.get_total_norm(grads)
            for group in self.param_groups:
                if (limit := group["max_grad_norm"]) is not None:
                    torch.nn.utils.clip_grads_with_norm_(group["params"], limit, norm)
        return True


def _split(lists: Lists, keys: list[Any]) -> Iterator[tuple[Any, Lists]]:
    """The lists, split by a key of each parameter."""
    indices: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        indices.setdefault(key, []).append(i)
    for key, chosen in indices.items():
        yield key, lists if len(indices) == 1 else {n: [each[i] for i in chosen] for n, each in lists.items()}


def _real(tensors: list[Tensor]) -> list[Tensor]:
    """Complex tensors as real ones of twice the elements, as torch's optimizers see them."""
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
