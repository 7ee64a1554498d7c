"""AdamW and Adam: torch's optimizers with a step of one pass over memory, and clipping by global norm inside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchweld import ops
from torchweld._torch import check_device_and_dtype_for_fused, scalar_dtype
from torchweld.optim.fused import FusedOptimizer, Lists, Work
from torchweld.optim.state import Group, State


class _FusedAdam(FusedOptimizer):
    """What AdamW and Adam share."""

    _torch = torch.optim.Adam

    def _unserved(self, group: Group) -> str | None:
        for flag in ("differentiable", "foreach"):
            if group[flag]:
                return f"{flag}=True"
        if any(isinstance(beta, Tensor) for beta in group["betas"]):
            return "betas given as tensors"
        if group["capturable"] and any(p.is_cpu for p in group["params"]):
            return "capturable=True on the CPU"  # torch says what is wrong with that
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
        # torch.tensor, as in torch: under FakeTensorMode its own step can read that, for it is known to be a constant.
        place: dict[str, Any] = {"dtype": dtype, "device": param.device if beside else "cpu"}
        state["step"] = torch.zeros((), **place) if beside else torch.tensor(0.0, **place)
        for name in self._state_names(group)[1:]:
            state[name] = self._like(group, param)

    def _add_state(self, group: Group, params: list[Tensor], lists: Lists) -> list[bool]:
        fresh = super()._add_state(group, params, lists)
        if group["amsgrad"]:  # may have been switched on later than the state was made
            for i, largest in enumerate(lists[name := "max_exp_avg_sq"]):
                if largest is None:
                    lists[name][i] = self.state[params[i]][name] = self._like(group, params[i])
        return fresh

    def _update(self, work: Work, **scalars: Any) -> None:
        group, lists = work.group, work.lists
        # Masters aside, nothing but the step and the place in the list tells parameters apart: the same on every
        # process, so that copies stay copies.
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
            decoupled=bool(group["decoupled_weight_decay"]),  # torch's take what is true, or not
            amsgrad=bool(group["amsgrad"]),
            maximize=bool(group["maximize"]),
            masters=lists.get("master", ()),
            rounding_seed=seed if self._option(group, "stochastic_rounding") else None,
            **scalars,
        )

    def _steps(self, work: Work) -> list[Tensor]:
        """On a GPU the steps live beside the parameters, as under fused=True: nothing is then read back to the host."""
        device, steps = work.lists["param"][0].device, work.lists["step"]
        if device.type == "cuda":
            for i, step in enumerate(steps):
                if step.device != device or step.dtype != torch.float32:
                    steps[i] = self.state[work.params[i]]["step"] = step.to(device, torch.float32)
        return steps


class AdamW(_FusedAdam, torch.optim.AdamW):
    """`torch.optim.AdamW` in one pass over memory: the same constructor, state_dict and behaviour.

    Clipping by global norm comes with the step: `max_grad_norm=1.0` does what `torch.nn.utils.clip_grad_norm_(params,
    1.0)` before each step does, for one more read of the gradients; `grad_norm` then holds the norm, over the gradients
    of all groups. The stored gradients are not clipped.

    The kernels serve float32, bfloat16 and float16 on the CPU and on CUDA, whatever `fused` says; complex parameters as
    pairs of real ones, DTensors by their local shards, with a norm over all processes; other dtypes run on the
    reference. foreach=True, differentiable=True, betas given as tensors, other tensor subclasses and devices without
    kernels get torch's own step, clipped as well.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad: as in torch, and so
        maximize, foreach, capturable, differentiable, fused.
        max_grad_norm: clip to this global norm; None: no clipping. May differ from group to group, and so may
        master_weights: keep a float32 master of each bfloat16 or float16 parameter, and float32 moments, in the state;
            the master is stepped, the parameter is its rounding, written in the same pass. The next step starts from
            what somebody else has written to a parameter: an average, a checkpoint.
        stochastic_rounding: round bfloat16 parameters up or down at random so that small updates count on average,
            without masters; the moments are float32. The bits depend on the step and the position alone.
        zero_grads: leave the gradients as zeros, in the same pass, also after an overflow; for those who do not set
            them to None. As under fused=True, a GradScaler then leaves unscaling and skipping to the step.
        offload: "cpu" keeps the state, with the masters, in the CPU's memory and steps there; gradients are copied over
            while the CPU works, and are left as they are (a GradScaler's scale stays in them). A checkpoint neither
            brings nor takes away an offload.

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
