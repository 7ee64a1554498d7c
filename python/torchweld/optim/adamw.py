"""AdamW and Adam: torch's optimizers with a step of one pass over memory, and clipping by global norm inside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchweld import backend, ops

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))

# params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps
_Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def _torch_step() -> Callable[[torch.optim.Optimizer], Any]:
    """torch's step without the hooks that torch wraps around it: ours has them already."""
    step: Any = torch.optim.Adam.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


class _FusedStep(torch.optim.Adam):
    """What AdamW and Adam share: everything is torch's but `step`."""

    # GradScaler hands its scale and its verdict to step(), as `grad_scale` and `found_inf`.
    _step_supports_amp_scaling = True
    _grad_norm: Tensor | None = None

    def _set_max_grad_norm(self, max_grad_norm: float | None) -> None:
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
            work = self._collect()
            if not isinstance(work, str):
                self._fused_step(work)
                return loss
            device = self.param_groups[0]["params"][0].device
            backend.choose(type(self).__name__, device, f"{work} (torch's own step does)")
            serve = self._prepare_for_torch()
        if serve:
            _torch_step()(self)
        return loss

    def _collect(self) -> list[tuple[dict[str, Any], _Lists]] | str:
        """The lists of each group, split by device; or why torch's own step is to serve all of them."""
        work: list[tuple[dict[str, Any], _Lists]] = []
        for group in self.param_groups:
            for flag in ("differentiable", "foreach"):
                if group[flag]:
                    return f"{flag}=True"
            if isinstance(group["betas"][0], Tensor):
                return "betas given as tensors"
            lists: _Lists = ([], [], [], [], [], [])
            has_complex = self._init_group(group, *lists)
            params = lists[0]
            if has_complex:
                return "complex parameters"
            if not _PLAIN.issuperset(map(type, params)):
                return "parameters of a tensor subclass"
            devices = {p.device for p in params}
            for device in devices:
                if device.type not in ("cpu", "cuda"):
                    return f"parameters on {device.type!r}"
                if reason := backend.unavailable(device.type):
                    return reason
                if group["capturable"] and device.type == "cpu":
                    return "capturable=True on the CPU"  # torch says what is wrong with that
                chosen = lists if len(devices) == 1 else self._only(lists, device)
                if device.type == "cuda":
                    self._move_steps(chosen)
                work.append((group, chosen))
        return work

    @staticmethod
    def _only(lists: _Lists, device: torch.device) -> _Lists:
        picked = [i for i, p in enumerate(lists[0]) if p.device == device]
        return cast(_Lists, tuple([each[i] for i in picked] if each else [] for each in lists))

    def _move_steps(self, lists: _Lists) -> None:
        """On a GPU the steps live beside the parameters, as under fused=True: nothing is then read back to the host."""
        params, steps = lists[0], lists[5]
        for i, step in enumerate(steps):
            if step.device != params[i].device or step.dtype != torch.float32:
                steps[i] = self.state[params[i]]["step"] = step.to(params[i].device, torch.float32)

    def _fused_step(self, work: list[tuple[dict[str, Any], _Lists]]) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        norm = None
        if any(group["max_grad_norm"] is not None for group, _ in work):
            norm = self._global_norm([grad for _, lists in work for grad in lists[1]], grad_scale)
        self._grad_norm = norm
        for group, lists in work:
            device = lists[0][0].device
            ops.adamw_(
                *lists,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled=group["decoupled_weight_decay"],
                amsgrad=group["amsgrad"],
                maximize=group["maximize"],
                max_grad_norm=group["max_grad_norm"],
                grad_norm=None if norm is None else norm.to(device, non_blocking=True),
                grad_scale=grad_scale,
                found_inf=found_inf,
            )

    @staticmethod
    def _global_norm(grads: list[Tensor], grad_scale: Tensor | None) -> Tensor:
        by_device: dict[torch.device, list[Tensor]] = {}
        for grad in grads:
            by_device.setdefault(grad.device, []).append(grad)
        norms = [ops.grad_norm(each, grad_scale=grad_scale) for each in by_device.values()]
        if len(norms) == 1:
            return norms[0]
        return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))

    def _prepare_for_torch(self) -> bool:
        """Unscales and clips the gradients in place, for torch's own step. False: overflow, there is to be no step."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [cast(Tensor, p.grad) for p in params]
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


class AdamW(_FusedStep, torch.optim.AdamW):
    """`torch.optim.AdamW` in one pass over memory: the same constructor, state_dict and behaviour.

    Clipping by global norm comes with the step: `max_grad_norm=1.0` does what `torch.nn.utils.clip_grad_norm_(params,
    1.0)` before each step does, for one more read of the gradients; `grad_norm` then holds the norm, over the gradients
    of all groups. The stored gradients are not clipped.

    The kernels serve float32, bfloat16 and float16 on the CPU and on CUDA, whatever `fused` says; other dtypes run on
    the reference. foreach=True, differentiable=True, betas given as tensors, complex parameters, tensor subclasses that
    carry their own kernels and devices without ours get torch's own step, clipped as well.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad: as in torch, and so
        maximize, foreach, capturable, differentiable, fused.
        max_grad_norm: clip to this global norm; None: no clipping. May differ from group to group.

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
    ) -> None:
        torch.optim.AdamW.__init__(
            self,
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
        self._set_max_grad_norm(max_grad_norm)


class Adam(_FusedStep):
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
    ) -> None:
        torch.optim.Adam.__init__(
            self,
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
        self._set_max_grad_norm(max_grad_norm)
