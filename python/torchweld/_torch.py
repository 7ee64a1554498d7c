"""Every private name of torch that torchweld uses, each with its public form, or the reason why there is none.

A torch that renames one breaks only this file. tests/python/test_architecture.py finds private names elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import _device_dtype_check_for_fused, _get_scalar_dtype
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

__all__ = [
    "FLASH",
    "FLASH_BACKWARD",
    "FLASH_CPU",
    "FLASH_CPU_BACKWARD",
    "DataDependentOutputException",
    "DeviceContext",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "TorchDispatchMode",
    "arguments_of",
    "below_autograd",
    "check_device_and_dtype_for_fused",
    "check_graph_capture",
    "check_once_for_fused",
    "constant_for_dynamo",
    "dispatch_mode_stack",
    "dispatch_modes",
    "forward_ad",
    "forward_mode_is_on",
    "function_mode_stack",
    "function_modes",
    "graph_is_kept",
    "has_global_hooks",
    "has_hooks",
    "is_batched",
    "is_zero_tensor",
    "keep_donated_buffers",
    "lazily_negated",
    "lazily_zero",
    "no_torch_function",
    "node_of",
    "profiling",
    "scalar_dtype",
    "scaled_dot_product_attention",
    "tracing",
    "transforms_active",
    "two_tensors",
    "version_of",
    "without_dynamo",
    "wrapper",
    "zero_all",
]

# ---- Checks before every call, each one call into C++. No public module has the classes FakeTensor, FunctionalTensor
# and DeviceContext above. torch documents TorchDispatchMode, but keeps it in a private module.

transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active  # no public form
tracing: Callable[[], object] = torch._C._get_tracing_state  # torch.jit.is_tracing() is public, but Dynamo refuses it
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack  # no public form
function_modes: Callable[[], bool] = torch._C._is_torch_function_mode_enabled  # no public form
profiling: Callable[[], bool] = torch._C._autograd._profiler_enabled  # no public form
graph_is_kept: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph  # no public form
is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor  # no public form


def forward_mode_is_on() -> bool:
    """Whether a `forward_ad.dual_level()` is open. The public `unpack_dual` answers for one tensor only."""
    return bool(forward_ad._current_level >= 0)


def is_zero_tensor(t: Tensor) -> bool:
    """Whether `t` is a zero without memory, as autograd makes them. There is no public form."""
    return t._is_zerotensor()


no_torch_function: Any = torch._C.DisableTorchFunction  # a context without function modes; no public form


def function_mode_stack() -> list[Any]:
    """The TorchFunctionModes around a call. There is no public form."""
    return list(torch.overrides._get_current_function_mode_stack())


def dispatch_mode_stack() -> list[Any]:
    """The TorchDispatchModes around a call. There is no public form."""
    return list(_get_current_dispatch_mode_stack())


# ---- Operators and functions

# The function behind F.scaled_dot_product_attention. The public name may already be replaced.
scaled_dot_product_attention: Callable[..., Tensor] = torch._C._nn.scaled_dot_product_attention


def arguments_of(operator: Any) -> list[Any]:
    """The arguments of an operator, each with its name and its type. The public form is a text to be parsed."""
    return list(operator._schema.arguments)


below_autograd: Any = torch._C._AutoDispatchBelowAutograd  # a context for an op's own gradients; no public form


def zero_all(tensors: list[Tensor]) -> None:
    """Sets all tensors to zero, on a GPU in one launch. The public form is `zero_()` of each."""
    torch._foreach_zero_(tensors)


def lazily_zero(t: Tensor) -> Tensor:
    """A zero without memory, of the shape and dtype of `t`. The public form is a gradient that autograd makes."""
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


def lazily_negated(t: Tensor) -> Tensor:
    """-`t` as a view. The public form, `z.conj().imag`, needs a complex tensor."""
    return torch._neg_view(t)


def two_tensors(t: Tensor) -> Tensor:
    """`t` in torch's own example of a wrapper subclass. There is no public one."""
    from torch.testing._internal.two_tensor import TwoTensor  # noqa: PLC0415  (slow to import)

    return TwoTensor(t, t.clone())


def version_of(t: Tensor) -> int:
    """How often `t` was written to in place; 0 for a tensor of inference mode. There is no public form."""
    return 0 if t.is_inference() else int(t._version)


def wrapper(cls: type[Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of a subclass with __torch_dispatch__, without memory. torch documents it, but under this name alone."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


# torch's operators of FlashAttention, by name. There is no public way to replace them.
FLASH = "_scaled_dot_product_flash_attention"
FLASH_BACKWARD = f"{FLASH}_backward"
FLASH_CPU = f"{FLASH}_for_cpu"
FLASH_CPU_BACKWARD = f"{FLASH_CPU}_backward"


def node_of(
    definition: type[torch.autograd.Function],
    slots: tuple[str, ...],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """`apply` of a subclass of `definition` whose forward, and the method that the autograd engine calls, are given.

    `slots` are the attributes that its contexts have, so that they need no dictionary.

    torch documents `forward` and `backward`; it calls them through Python functions of its own, which cost 1 us. torch
    finds the class of the nodes under `_backward_cls` alone.
    """
    function: Any = type(definition.__name__, (definition,), {"forward": staticmethod(forward)})
    own = {"__slots__": slots, "apply": backward, "definition": definition}
    function._backward_cls = type(f"{definition.__name__}Backward", (function._backward_cls,), own)
    return super(torch.autograd.Function, function).apply


# ---- torch.compile


def constant_for_dynamo(function: Callable[..., Any]) -> None:
    """Makes Dynamo call `function` while it traces. The public assume_constant_result imports Dynamo: seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def without_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: Dynamo does not trace the function.

    The public torch.compiler.disable imports Dynamo, which takes seconds. Its form that imports it late costs each call
    4 us, so it is called only where Dynamo traces, or looks at the frames that Python begins.
    """
    apart = torch._compile._disable_dynamo(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or _dynamo_callback() is not None:
            return apart(*args, **kwargs)
        return function(*args, **kwargs)

    return call


_dynamo_callback: Callable[[], object] = torch._C._dynamo.eval_frame.get_eval_frame_callback  # no public form


def keep_donated_buffers() -> None:
    """Lets a compiled backward run again. torch's own error message names this setting; there is no public form."""
    torch._functorch.config.donated_buffer = False


# ---- Modules


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of `module` calls hooks. There is no public form."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


has_global_hooks: Callable[[], bool] = _has_any_global_hook  # no public form

# ---- Optimizers: the checks of torch's own steps, for the same errors. There is no public form.

check_device_and_dtype_for_fused: Callable[[Tensor], None] = _device_dtype_check_for_fused
scalar_dtype: Callable[..., torch.dtype] = _get_scalar_dtype  # dtype of the state "step"


def check_graph_capture(optimizer: Any) -> None:
    """Raises in a graph capture with capturable=False. torch 2.10 has this check under the second name."""
    check = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    (check or optimizer._cuda_graph_capture_health_check)()


def check_once_for_fused(optimizer: Any, param: Tensor) -> None:
    """check_device_and_dtype_for_fused of one parameter, once for each optimizer, as in torch."""
    if getattr(optimizer, "_need_device_dtype_check_for_fused", True):
        _device_dtype_check_for_fused(param)
        optimizer._need_device_dtype_check_for_fused = False
