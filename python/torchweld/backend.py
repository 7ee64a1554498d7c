"""The choice of the backend for a call: "cuda", "cpu" or "reference".

"cuda" serves tensors on a GPU if `_cuda` is built, "cpu" tensors on the CPU if `_cpu` loads, "reference" all others.
`use_backend("reference")` or `TORCHWELD_BACKEND=reference` forces a backend. The reference also serves calls that the
kernels do not take. Each reason is logged once at INFO. Under `TORCHWELD_STRICT=1` or `with strict():` it raises.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch

from torchweld._torch import (
    constant_for_dynamo,
    dispatch_modes,
    forward_ad,
    forward_mode_is_on,
    function_modes,
    profiling,
    tracing,
    transforms_active,
)

__all__ = [
    "BACKENDS",
    "NotServedError",
    "active",
    "choose",
    "kernels",
    "node",
    "strict",
    "unavailable",
    "use_backend",
    "whole_call",
]

BACKENDS = ("cuda", "cpu", "reference")

_CPU = torch.device("cpu")
_log = logging.getLogger("torchweld")
_logged: set[tuple[str, str]] = set()


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"torchweld.{name}"), None
    except ModuleNotFoundError:
        return None, f"torchweld.{name} is not built; reinstall with a compiler for it"
    except ImportError as error:  # built, but broken: the first use raises this error
        return None, f"torchweld.{name} does not load: {error}"


# A missing or broken module must not stop `import torchweld`. Loading a module takes about a millisecond.
_modules: dict[str, tuple[ModuleType | None, str | None]] = {"cpu": _load("_cpu"), "cuda": _load("_cuda")}

if TYPE_CHECKING:
    from torchweld import _cpu

    class Kernels(ModuleType):
        """The kernels of a compiled module, with the types of `_cpu.pyi`."""

        OPTIMIZER_TABLE_WORDS: int
        GRAD_NORM_BLOCKS: int
        leaves_wide_output: bool
        adamw_ = staticmethod(_cpu.adamw_)
        allow_whole_calls = staticmethod(_cpu.allow_whole_calls)
        attention_backward = staticmethod(_cpu.attention_backward)
        attention_forward = staticmethod(_cpu.attention_forward)
        cross_entropy_backward = staticmethod(_cpu.cross_entropy_backward)
        cross_entropy_forward = staticmethod(_cpu.cross_entropy_forward)
        dropout = staticmethod(_cpu.dropout)
        gated_backward = staticmethod(_cpu.gated_backward)
        gated_forward = staticmethod(_cpu.gated_forward)
        gelu_backward = staticmethod(_cpu.gelu_backward)
        gelu_forward = staticmethod(_cpu.gelu_forward)
        grad_norm = staticmethod(_cpu.grad_norm)
        layer_norm_backward = staticmethod(_cpu.layer_norm_backward)
        layer_norm_forward = staticmethod(_cpu.layer_norm_forward)
        layer_norm_forward_workspace = staticmethod(_cpu.layer_norm_forward_workspace)
        layer_norm_workspace = staticmethod(_cpu.layer_norm_workspace)
        linear_cross_entropy = staticmethod(_cpu.linear_cross_entropy)
        paged_attention = staticmethod(_cpu.paged_attention)
        rotary_embedding = staticmethod(_cpu.rotary_embedding)
        sgd_ = staticmethod(_cpu.sgd_)


# The compiled module for each device type that has one. Callers ask `choose` first.
kernels: dict[str, Kernels] = {name: cast("Kernels", m) for name, (m, _) in _modules.items() if m is not None}


class NotServedError(RuntimeError):
    """The kernels do not take this call, for `reason`, and the reference is not allowed."""

    def __init__(self, op: str, kind: str, reason: str) -> None:
        super().__init__(
            f"[{op}] the {kind} kernels do not serve this call: {reason}. The pure-PyTorch reference does: "
            f"use torchweld.use_backend('reference') or TORCHWELD_BACKEND=reference."
        )
        self.reason = reason


class _Settings:
    """Settings, read from the environment at the first call. `use_backend` and `strict` change them later."""

    def __init__(self) -> None:
        self.forced: str | None = None
        self.strict = False
        self.loaded = False

    def load(self) -> None:
        self.strict = os.environ.get("TORCHWELD_STRICT", "") not in ("", "0")
        if name := os.environ.get("TORCHWELD_BACKEND"):
            self.forced = _checked(name, "TORCHWELD_BACKEND")
        self.loaded = True


_settings = _Settings()

if "cpu" in kernels:  # what decides whether a whole call (see `whole_call`) may skip the ways through Python
    kernels["cpu"].allow_whole_calls(
        watchers=(dispatch_modes, function_modes, profiling, transforms_active, tracing),
        forward_mode=forward_ad,
        kernels=kernels,
        settings=_settings,
    )


def _load_once() -> None:
    if not _settings.loaded:
        _settings.load()


# Dynamo calls this while it traces. A traced read of the environment would hold for the first call alone.
constant_for_dynamo(_load_once)


def unavailable(name: str) -> str | None:
    """Why backend `name` cannot run on this machine; None if it can."""
    if name == "reference":
        return None
    if reason := _modules[name][1]:
        return reason
    if name == "cuda" and not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: no NVIDIA GPU, no driver, or a torch without CUDA"
    return None


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    if reason := unavailable(name):
        raise RuntimeError(f"{source}: backend {name!r} cannot be used here: {reason}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend ("cuda", "cpu" or "reference") for the calls inside the `with` block, in the whole process.

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: it cannot run here; the message says why and what to do.
    """
    _load_once()
    before = _settings.forced
    _settings.forced = _checked(name, "use_backend")
    try:
        yield
    finally:
        _settings.forced = before


@contextmanager
def strict() -> Iterator[None]:
    """Inside the block a call that the kernels do not take raises `NotServedError`, as with `TORCHWELD_STRICT=1`."""
    _load_once()
    before, _settings.strict = _settings.strict, True
    try:
        yield
    finally:
        _settings.strict = before


def active(device: torch.device | str = "cpu") -> str:
    """The backend that serves float32 tensors on `device` now."""
    return choose("active", torch.device(device), None)


def choose(op: str, device: torch.device, refusal: str | None) -> str:
    """The backend for one call of `op` on `device`; `refusal` says why its kernels do not take it, None if they do."""
    _load_once()
    forced = _settings.forced
    # torch.func's transforms, forward-mode derivatives and torch.jit.trace see the reference's operators, not a kernel.
    if forced == "reference" or transforms_active() or forward_mode_is_on() or tracing():
        return "reference"
    kind = "cpu" if device == _CPU else device.type  # device.type makes a string, 0.2 us
    if forced is not None and forced != kind:
        raise RuntimeError(
            f"[{op}] backend {forced!r} is forced, but the tensors are on {kind!r}; move them to {forced!r}"
        )
    if refusal is None:
        if kind in kernels:
            return kind
        refusal = _modules[kind][1] if kind in _modules else f"no kernels for device {kind!r}"
    assert refusal is not None
    if _settings.strict or (kind == "cpu" and refusal is _modules["cpu"][1]):
        # Every install has the CPU kernels. If they do not load, the error must show.
        raise NotServedError(op, kind, refusal)
    if not torch.compiler.is_compiling() and (op, refusal) not in _logged:
        _logged.add((op, refusal))
        _log.info("[%s] runs on the reference: %s", op, refusal)
    return "reference"


def whole_call(op: str) -> Callable[..., Any]:
    """The CPU module's function that does a whole call of `op`, as csrc/bindings/common_call.h says.

    It returns the output; True if the call is common but autograd must record it; None if it is not common. A module
    that does not load has no common calls.
    """
    return getattr(_modules["cpu"][0], f"whole_{op}", _not_common)


def node(op: str) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The CPU module's forward and backward of an autograd node, as csrc/bindings/node.h says; None without the module.

    The backward is a method: the node is its first argument.
    """
    module = _modules["cpu"][0]
    if module is None:
        return None
    return getattr(module, f"node_{op}_forward"), module.method(getattr(module, f"node_{op}_backward"))


def _not_common(*_: object, **__: object) -> None:
    """A whole call without a kernel."""


def module(device: torch.device) -> Kernels:
    """The compiled module for `device`. Callers ask `choose` first."""
    return kernels[device.type]
