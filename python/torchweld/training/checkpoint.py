"""A training run on disk: OUT/checkpoint-STEP, a directory that appears whole or not at all.

    config.json model.safetensors tokenizer.json    a GPT-2 that Hugging Face's transformers loads too
    optimizer.safetensors                           the optimizer's moments by parameter name
    training.json                                   settings, step, losses

Only the newest is kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models.gpt2 import GPT2, GPT2Config
from torchweld.training.corpus import end_of_text

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in `out`, oldest first."""
    found = [(int(match[1]), path) for path in out.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def locate(directory: Path) -> Path:
    """`directory` itself if it is a checkpoint, else the newest one in it.

    Raises:
        UserError: there is none.
    """
    if (directory / "config.json").is_file():
        return directory
    if found := checkpoints(directory):
        return found[-1]
    got = "an empty or foreign directory" if directory.is_dir() else "no such directory"
    raise UserError(
        f"checkpoint {directory}: expected a directory of `torchweld train` or of a Hugging Face GPT-2 (config.json, "
        f"model.safetensors, tokenizer.json), but got {got}"
    )


def prepare_output(out: Path) -> None:
    """Creates `out`, and proves that it can be written before hours are spent.

    Raises:
        UserError: it cannot.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise _unwritable(out, error) from None


def remove(out: Path) -> None:
    """Removes every checkpoint in `out`."""
    for path in checkpoints(out):
        shutil.rmtree(path)


def save(
    out: Path,
    step: int,
    model: GPT2,
    tokenizer: Tokenizer,
    optimizer_state: dict[str, Tensor],
    training: dict[str, Any],
) -> Path:
    """Writes OUT/checkpoint-`step` aside, renames it, then removes older ones. Returns its path."""
    target = out / f"checkpoint-{step}"
    if target.exists():  # written by this run at this very step
        return target
    aside = out / f".{target.name}-{os.getpid()}"
    try:
        aside.mkdir()
        end = end_of_text(tokenizer)
        config = {**model.config.to_hugging_face(), "bos_token_id": end, "eos_token_id": end}
        _write_json(aside / "config.json", config)
        _write_json(aside / "training.json", {"step": step, **training})
        tokenizer.save(str(aside / "tokenizer.json"))
        _write_tensors(aside / "model.safetensors", model.to_hugging_face())
        _write_tensors(aside / "optimizer.safetensors", optimizer_state)
        aside.rename(target)
    except (OSError, SafetensorError) as error:
        raise _unwritable(out, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for path in checkpoints(out):
        if path != target:
            shutil.rmtree(path)
    return target


def load_model(checkpoint: Path) -> tuple[GPT2Config, dict[str, Tensor], Tokenizer]:
    """The config, the weights in Hugging Face's layout and the tokenizer.

    Raises:
        UserError: a file is missing, damaged or of another model.
    """
    config = GPT2Config.from_hugging_face(_read_json(checkpoint / "config.json"))
    path = checkpoint / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from None
    except Exception as error:  # tokenizers raises nothing narrower
        raise _damaged(path, str(error)) from None
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise _damaged(path, f"{tokenizer.get_vocab_size()} tokens for a vocab_size of {config.vocab_size}")
    return config, _read_tensors(checkpoint / "model.safetensors"), tokenizer


def load_training(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of training.json and of optimizer.safetensors.

    Raises:
        UserError: a file is missing or damaged.
    """
    path = checkpoint / "training.json"
    training = _read_json(path)
    if missing := {"step", "settings", "digest", "losses", "validation"} - training.keys():
        raise _damaged(path, f"no {sorted(missing)[0]!r} in it")
    losses = training["losses"]
    if not isinstance(losses, list) or len(losses) != training["step"] or not isinstance(training["settings"], dict):
        raise _damaged(path, "contents that contradict each other")
    return training, _read_tensors(checkpoint / "optimizer.safetensors")


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`.

    Raises:
        UserError: the tensors belong to another model.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        states.setdefault(parameter, {})[key] = tensor
    names = {parameter: name for name, parameter in model.named_parameters()}
    expected = {(name, key) for name in names.values() for key in ("step", "exp_avg", "exp_avg_sq")}
    fits = {(name, key) for name, state in states.items() for key in state} == expected and all(
        states[name]["exp_avg"].shape == states[name]["exp_avg_sq"].shape == p.shape for p, name in names.items()
    )
    if not fits:
        raise UserError(
            "optimizer.safetensors: expected Adam's moments of every parameter, but got others; the checkpoint is "
            "damaged or of another kind"
        )
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    state = {index: states[names[parameter]] for index, parameter in enumerate(ordered)}
    # load_state_dict knows which of them move to the parameter's device and dtype.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _unwritable(out: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else error
    return UserError(f"--out {out}: expected a directory that can be written, but got: {reason}; choose another")


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"checkpoint file {path}: expected one that `torchweld train` wrote, but got: {reason}; "
        f"the checkpoint is damaged or of another kind"
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from None
    except ValueError as error:
        raise _damaged(path, f"no JSON ({error})") from None
    if not isinstance(values, dict):
        raise _damaged(path, f"a {type(values).__name__}, not an object")
    return values


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from None
    except SafetensorError as error:
        raise _damaged(path, str(error)) from None
