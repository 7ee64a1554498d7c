"""What is kept between steps beyond torch's: options in the groups, masters, moments wider than their parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchweld.optim import sharding

Group = dict[str, Any]
State = dict[str, Tensor]

MASTER = "master_param"
_NARROW = (torch.bfloat16, torch.float16)


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


class KeptState(torch.optim.Optimizer):
    """The options in the parameter groups, so in the state_dict: `max_grad_norm`, `master_weights`,
    `stochastic_rounding` and `zero_grads`. And `offload`, which a checkpoint does not decide.

    16-bit parameters under `master_weights` have a float32 `master_param` in their state: it is stepped, and they are
    its rounding. Their moments, and those of bfloat16 parameters under `stochastic_rounding`, are float32.
    """

    # The version of each parameter that its master agrees with: what changed it since was not us.
    _agreed: dict[Tensor, int] | None = None

    # ---- Options

    def _add_options(self, **options: Any) -> None:
        """Adds what torch's constructor does not know to the defaults and the groups."""
        if options["offload"] not in (None, "cpu"):
            raise ValueError(f"Invalid offload value: {options['offload']!r}; expected 'cpu', or None")
        self.defaults |= {"stochastic_rounding": False, **options}
        for group in self.param_groups:
            self._complete(group)

    def _complete(self, group: Group) -> None:
        """Gives a group the options that it lacks (a checkpoint of torch's optimizer does not know them); checks."""
        for name in ("max_grad_norm", "master_weights", "stochastic_rounding", "zero_grads"):
            group.setdefault(name, self.defaults[name])
        group["offload"] = self.defaults["offload"]
        if (limit := group["max_grad_norm"]) is not None and not limit > 0:
            raise ValueError(f"Invalid max_grad_norm value: {limit}; expected a number above 0, or None")
        if group["master_weights"] and group["stochastic_rounding"]:
            raise ValueError("master_weights and stochastic_rounding: expected at most one, for a master loses nothing")
        if group["stochastic_rounding"] and any(p.dtype == torch.float16 for p in group["params"]):
            raise ValueError("stochastic_rounding: expected bfloat16 parameters, or wider ones, but got float16")
        if beyond := self._beyond_torch(group):
            for flag in ("foreach", "differentiable", *(("capturable",) if group["offload"] else ())):
                if group.get(flag):
                    raise ValueError(f"{beyond}: expected {flag}=False or None, but got True")
        if group["offload"] and any(sharding.is_dtensor(p) for p in group["params"]):
            raise ValueError("offload: expected plain parameters, but got DTensors; FSDP2 has a CPUOffloadPolicy")

    def _beyond_torch(self, group: Group | None = None) -> str | None:
        """What is asked for that torch's own step cannot do."""
        for each in self.param_groups if group is None else (group,):
            for option in ("master_weights", "stochastic_rounding", "offload", "zero_grads"):
                if each[option]:
                    return f"{option}={each[option]!r}"
        return None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch."""
        super().add_param_group(param_group)
        if "offload" in self.defaults:  # torch's constructor comes first
            self._complete(self.param_groups[-1])

    # ---- State

    def _like(self, group: Group, param: Tensor) -> Tensor:
        """A moment of zeros for a parameter that has none yet."""
        device = None if group["offload"] is None else torch.device("cpu")
        return torch.zeros_like(param, dtype=_moment_dtype(group, param), device=device)

    def _masters(self, params: list[Tensor]) -> list[Tensor]:
        """The master of each parameter; the parameter itself where none is needed."""
        masters = []
        agreed = self._agreed or {}
        for p in params:
            if p.dtype not in _NARROW:
                masters.append(p)
                continue
            state = self.state[p]
            master = state.get(MASTER)
            if master is None:
                home = p.device if self.defaults["offload"] is None else torch.device("cpu")
                master = state[MASTER] = p.detach().to(home, torch.float32)
            elif agreed.get(p) != p._version:
                # Written to by somebody else, a checkpoint or an average: taken over where it is not the rounding.
                found = p.detach().to(master.device)
                master.copy_(torch.where(master.to(p.dtype) == found, master, found.float()))
            masters.append(master)
        return masters

    def _agree(self, params: list[Tensor]) -> None:
        self._agreed = self._agreed if self._agreed is not None else {}
        self._agreed.update((p, p._version) for p in params)

    # ---- Checkpoints

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; but masters stay float32, and moments get the dtype and the device that they have here."""
        handle = self.register_load_state_dict_pre_hook(_keep)  # the last of the hooks: users see plain tensors
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._agreed = None
        for group in self.param_groups:
            self._complete(group)
            for p in group["params"]:
                for name, value in self.state.get(p, {}).items():
                    if isinstance(value, _Kept):
                        self.state[p][name] = self._placed(group, p, name, value.tensor)
                    elif name == "step" and group["offload"] and isinstance(value, Tensor):
                        self.state[p][name] = value.cpu()

    def _placed(self, group: Group, param: Tensor, name: str, value: Tensor) -> Tensor:
        device = param.device if group["offload"] is None else torch.device("cpu")
        if name == MASTER:
            return value.to(device, torch.float32)
        return value.to(device, _moment_dtype(group, param)) if param.is_floating_point() else value.to(device)


def _moment_dtype(group: Group, param: Tensor) -> torch.dtype:
    wide = param.dtype in _NARROW and (group["master_weights"] or group["stochastic_rounding"])
    return torch.float32 if wide else param.dtype
