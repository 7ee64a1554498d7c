"""AdamW and Adam: torch's optimizers with a step of one pass over memory, and clipping by global norm inside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchweld import backend, ops
from torchweld._torch import check_device_and_dtype_for_fused, scalar_dtype
from torchweld.optim.fused import FusedOptimizer, Lists, Work
from torchweld.optim.state import Group, State


class _FusedAdam(FusedOptimizer):
    """What AdamW and Adam share."""

    _torch = torch.optim.Adam
    _whole = staticmethod(backend.whole_call("adamw_step"))

    def _unserved(self, group: Group) -> str | None:
        for flag in ("differentiable", "foreach"):
            if group[flag]:
                return f"{flag}=True"
        if any(isinstance(beta, Tensor) for beta in group["betas"]):
            return "betas given as tensors"
        if group["capturable"] and any(p.is_cpu for p in group["params"]):
            return "capturable=True on the CPU"  # torch raises its own error
        return None

    def _sparse(self) -> str:
        raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")

    def _state_names(self, group: Group) -> tuple[str, ...]:
        return ("step", "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))

    def _init_state(self, group: Group, param: Tensor, state: State) -> None:
        if group["fused"]:
            check_device_and_dtype_for_fused(param)
        beside = (group["capturable"] or group["fused"]) and self._home is None
        dtype = scalar_dtype(is_fused=group["fused"])
        # torch.tensor, as in torch: torch's own step can read a constant under FakeTensorMode.
        place: dict[str, Any] = {"dtype": dtype, "device": param.device if beside else "cpu"}
        state["step"] = torch.zeros((), **place) if beside else torch.tensor(0.0, **place)
        for name in self._state_names(group)[1:]:
            state[name] = self._like(group, param)

    def _add_state(self, group: Group, params: list[Tensor], lists: Lists) -> list[bool]:
        fresh = super()._add_state(group, params, lists)
        if group["amsgrad"]:  # the user may have set it after the state was made
            for i, largest in enumerate(lists[name := "max_exp_avg_sq"]):
                if largest is None:
                    lists[name][i] = self.state[params[i]][name] = self._like(group, params[i])
        return fresh

    def _update(self, work: Work, **scalars: Any) -> None:
        group, lists = work.group, work.lists
        # The seed is the group's index, which is the same on every process, so copies of a parameter stay equal.
        seed = next(i for i, each in enumerate(self.param_groups) if each is group)
        ops.adamw_(
            lists["param"],
            lists["grad"],
            lists["exp_avg"],
            lists["exp_avg_sq"],
            lists.get("max_exp_avg_sq", []),
            self._steps(work),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=bool(group["decoupled_weight_decay"]),  # torch takes any value that has a truth value
            amsgrad=bool(group["amsgrad"]),
            maximize=bool(group["maximize"]),
            masters=lists.get("master", ()),
            rounding_seed=seed if self._option(group, "stochastic_rounding") else None,
            **scalars,
        )

    def _steps(self, work: Work) -> list[Tensor]:
        """The counts of steps. On a GPU they are on the device, as with fused=True: the host reads nothing back."""
        device, steps = work.lists["param"][0].device, work.lists["step"]
        if device.type == "cuda":
            for i, step in enumerate(steps):
                if step.device != device or step.dtype != torch.float32:
                    steps[i] = self.state[work.params[i]]["step"] = step.to(device, torch.float32)
        return steps


class AdamW(_FusedAdam, torch.optim.AdamW):
    """`torch.optim.AdamW` in one pass over memory: the same constructor, state_dict and behaviour.

    The step clips by global norm: `max_grad_norm=1.0` replaces a call of `torch.nn.utils.clip_grad_norm_(params, 1.0)`
    before each step, and costs one more read of the gradients. `grad_norm` is then the norm of the gradients of all
    groups. The stored gradients are not clipped.

    The kernels serve float32, bfloat16 and float16 on the CPU and on CUDA, with every value of `fused`. They step
    complex parameters as pairs of real numbers, and DTensors by their local shards, with a norm over all processes.
    Other dtypes run on the reference. torch's own step serves foreach=True, differentiable=True, betas given as
    tensors, other tensor subclasses and devices without kernels; it clips too.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad: as in torch.
        maximize, foreach, capturable, differentiable, fused: as in torch.
        max_grad_norm: clip to this global norm; None: no clipping. May be set per parameter group.
        master_weights: keep in the state a float32 master of each bfloat16 or float16 parameter, and float32 moments.
            The step updates the master and writes its rounding to the parameter in the same pass. If other code has
            written to a parameter (an average, a checkpoint), the next step starts from that. May be set per parameter
            group.
        stochastic_rounding: round bfloat16 parameters up or down at random, so that small updates count on average
            without masters. The moments are float32. The bits depend on the step and the position alone. May be set per
            parameter group.
        zero_grads: set the gradients to zero in the same pass, also after an overflow, for loops that do not set them
            to None. As with fused=True, a GradScaler then leaves unscaling and skipping to the step. May be set per
            parameter group.
        offload: "cpu" keeps the state and the masters in the CPU's memory and steps there. Gradients are copied while
            the CPU works; the originals stay as they are, with a GradScaler's scale. Checkpoints do not change
            `offload`.

    Loshchilov, Hutter: Decoupled Weight Decay Regularization, arXiv:1711.05101.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        zero_grads: bool = False,
        offload: str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._add_options(
            max_grad_norm=max_grad_norm,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            zero_grads=zero_grads,
            offload=offload,
        )


class Adam(_FusedAdam, torch.optim.Adam):
    """`torch.optim.Adam` in one pass over memory; `max_grad_norm` and the rest as in `torchweld.optim.AdamW`.

    Kingma, Ba: Adam: A Method for Stochastic Optimization, arXiv:1412.6980.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        zero_grads: bool = False,
        offload: str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._add_options(
            max_grad_norm=max_grad_norm,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            zero_grads=zero_grads,
            offload=offload,
        )
