"""What is kept between steps beyond torch's: options, masters, moments wider than their parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchweld.ops._arguments import flag, number, shown
from torchweld.optim import sharding

Group = dict[str, Any]
State = dict[str, Tensor]

MASTER = "master_param"
_NARROW = (torch.bfloat16, torch.float16)
_SAVED = (
    "max_grad_norm",
    "master_weights",
    "stochastic_rounding",
    "zero_grads",
)  # what a checkpoint brings


class _Kept:
    """A tensor that torch's load_state_dict is not to cast to its parameter's dtype and device."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _keep(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """All tensors but the steps, whose place torch knows."""
    state = {
        index: {n: _Kept(v) if isinstance(v, Tensor) and n != "step" else v for n, v in each.items()}
        if isinstance(each, dict)
        else each
        for index, each in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _with_options(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict whose groups say which options are in use."""
    groups = [{**saved} for saved in state_dict["param_groups"]]
    for saved, group in zip(groups, optimizer.param_groups, strict=True):
        for name in _SAVED:
            if value := optimizer._option(group, name):  # type: ignore[attr-defined]
                saved[name] = value
    return {**state_dict, "param_groups": groups}


class KeptState(torch.optim.Optimizer):
    """The options `max_grad_norm`, `master_weights`, `stochastic_rounding` and `zero_grads`; and `offload`.

    A parameter group has an option only where it differs from the optimizer's default: any group of torch's serves, and
    a flattened checkpoint of torch's optimizer has all keys of the groups. A state_dict says which options are in use;
    what it does not say is as the constructor had it. A checkpoint does not decide `offload`.

    16-bit parameters under `master_weights` have a float32 `master_param` in their state: it is stepped, and they are
    its rounding. Their moments, and those of bfloat16 parameters under `stochastic_rounding`, are float32.
    """

    # ---- Options

    def _add_options(self, **options: Any) -> None:
        """Adds what torch's constructor does not know to the defaults, and checks the groups."""
        if options["offload"] not in (None, "cpu"):
            raise ValueError(f"Invalid offload value: {shown(options['offload'])}; expected 'cpu', or None")
        self.defaults |= options
        for group in self.param_groups:
            self._check_options(group)

    def _option(self, group: Group, name: str) -> Any:
        return group.get(name, self.defaults.get(name))

    def _check_options(self, group: Group) -> None:
        """Leaves a group the options that differ from the defaults; refuses what does not go together."""
        op = type(self).__name__
        for options in (self.defaults, group):
            if options.get("max_grad_norm") is not None:
                number(op, "max_grad_norm", options["max_grad_norm"], "a number above 0, or None")
            for name in ("master_weights", "stochastic_rounding", "zero_grads"):
                if name in options:
                    flag(op, name, options[name])
        for name in (*_SAVED, "offload"):
            if name in group and (name == "offload" or group[name] == self.defaults.get(name)):
                del group[name]
        option = partial(self._option, group)
        if (limit := option("max_grad_norm")) is not None and not limit > 0:
            raise ValueError(f"Invalid max_grad_norm value: {limit}; expected a number above 0, or None")
        if option("master_weights") and option("stochastic_rounding"):
            raise ValueError("master_weights and stochastic_rounding: expected at most one, for a master loses nothing")
        if option("stochastic_rounding") and any(p.dtype == torch.float16 for p in group["params"]):
            raise ValueError("stochastic_rounding: expected bfloat16 parameters, or wider ones, but got float16")
        if beyond := self._beyond_torch(group):
            for name in ("foreach", "differentiable", *(("capturable",) if option("offload") else ())):
                if group.get(name):
                    raise ValueError(f"{beyond}: expected {name}=False or None, but got True")
        if option("offload") and any(sharding.is_dtensor(p) for p in group["params"]):
            raise ValueError("offload: expected plain parameters, but got DTensors; FSDP2 has a CPUOffloadPolicy")
        if option("zero_grads"):  # after an overflow too: GradScaler is to call the step then
            self._step_supports_amp_scaling = True

    def _beyond_torch(self, group: Group | None = None) -> str | None:
        """What is asked for that torch's own step cannot do."""
        for each in self.param_groups if group is None else (group,):
            for name in ("master_weights", "stochastic_rounding", "offload", "zero_grads"):
                if value := self._option(each, name):
                    return f"{name}={value!r}"
        return None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch."""
        super().add_param_group(param_group)
        if "offload" in self.defaults:  # torch's constructor comes first
            self._check_options(self.param_groups[-1])

    # ---- State

    @property
    def _home(self) -> torch.device | None:
        """Where the state is; None: beside each parameter."""
        return None if self.defaults.get("offload") is None else torch.device("cpu")

    def _like(self, group: Group, param: Tensor) -> Tensor:
        """A moment of zeros for a parameter that has none yet."""
        return torch.zeros_like(param, dtype=self._moment_dtype(group, param), device=self._home)

    def _moment_dtype(self, group: Group, param: Tensor) -> torch.dtype:
        wide = self._option(group, "master_weights") or self._option(group, "stochastic_rounding")
        return torch.float32 if wide and param.dtype in _NARROW else param.dtype

    def _masters(self, params: list[Tensor]) -> list[Tensor]:
        """The master of each parameter; the parameter itself where none is needed."""
        masters = []
        for p in params:
            if p.dtype not in _NARROW:
                masters.append(p)
                continue
            state = self.state[p]
            if state.get(MASTER) is None:
                state[MASTER] = p.detach().to(self._home or p.device, torch.float32)
            masters.append(state[MASTER])
        return masters

    # ---- Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As in torch; the groups also say which of the options are in use."""
        handle = self.register_state_dict_post_hook(_with_options, prepend=True)  # users' hooks see what is saved
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; but masters stay float32, and moments get the dtype and the device that they have here."""
        handle = self.register_load_state_dict_pre_hook(_keep)  # the last of the hooks: users see plain tensors
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            self._check_options(group)
            for p in group["params"]:
                for name, value in list(self.state.get(p, {}).items()):
                    if isinstance(value, _Kept):
                        self.state[p][name] = self._placed(group, p, name, value.tensor)
                    elif isinstance(value, dict) and not value:  # what a flattened checkpoint did not have
                        del self.state[p][name]
                    elif name == "step" and self._home is not None and isinstance(value, Tensor):
                        self.state[p][name] = value.cpu()

    def _placed(self, group: Group, param: Tensor, name: str, value: Tensor) -> Tensor:
        device = self._home or param.device
        if name == MASTER:
            return value.to(device, torch.float32)
        return value.to(device, self._moment_dtype(group, param)) if param.is_floating_point() else value.to(device)
