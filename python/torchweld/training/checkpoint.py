"""A training run on disk: OUT/checkpoint-STEP, a directory that appears whole or not at all.

    config.json model.safetensors tokenizer.json    a model that Hugging Face's transformers loads too, where it has it
    optimizer.safetensors                           the optimizer's state by parameter name
    training.json                                   settings, step, losses

With --checkpoint-format distributed the folders model and optimizer take the place of the two files of tensors: see
`shards`. Only the newest is kept. OUT/best-STEP is the model alone, of the best validation, where a run keeps that.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models.published import Published

PARTS = "parts.json"  # beside weights in parts: the program whose they are
_NAME = re.compile(r"(checkpoint|best)-(\d+)")


@dataclass(frozen=True)
class Weights:
    """What of a model is kept. `config`: the contents of config.json; `files`: contents of others by their names."""

    config: dict[str, Any]
    model: Published
    files: Mapping[str, str]


def checkpoints(out: Path, kind: str = "checkpoint") -> list[Path]:
    """The checkpoints in `out`, oldest first; or those of the kind "best"."""
    found = [(int(match[2]), path) for path in out.glob(f"{kind}-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def best(out: Path) -> Path | None:
    """The model of the best validation, where a run keeps it."""
    found = checkpoints(out, "best")
    return found[-1] if found else None


def locate(directory: Path, to_use: bool = False) -> Path:
    """`directory` itself if it is a checkpoint, else the newest one in it; `to_use`: rather the best model, if kept.

    Raises:
        UserError: there is none.
    """
    if (directory / "config.json").is_file():
        return directory
    if found := (to_use and checkpoints(directory, "best")) or checkpoints(directory):
        return found[-1]
    got = "an empty or foreign directory" if directory.is_dir() else "no such directory"
    raise UserError(
        f"checkpoint {directory}: expected a directory of `torchweld train` or of a Hugging Face model (config.json, "
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
        raise unwritable(out, error) from None


def remove(out: Path) -> None:
    """Removes every checkpoint and every best model in `out`."""
    for path in checkpoints(out) + checkpoints(out, "best"):
        shutil.rmtree(path)


def save(out: Path, step: int, weights: Weights, optimizer_state: dict[str, Tensor], training: dict[str, Any]) -> Path:
    """Writes OUT/checkpoint-`step`, a run that can go on; returns its path."""

    def write(directory: Path) -> None:
        _write_json(directory / "training.json", {"step": step, **training})
        write_tensors(directory / "optimizer.safetensors", optimizer_state)

    return _replace(out, "checkpoint", step, weights, write)


def save_best(out: Path, step: int, weights: Weights) -> Path:
    """Writes OUT/best-`step`, a model alone; returns its path."""
    return _replace(out, "best", step, weights, lambda directory: None)


def _replace(out: Path, kind: str, step: int, weights: Weights, more: Callable[[Path], None]) -> Path:
    """Writes OUT/KIND-`step` aside, renames it, then removes older ones."""
    target = out / f"{kind}-{step}"
    if target.exists():  # written by this run at this very step
        return target
    aside = out / f".{target.name}-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)  # left by one that was killed and had the same number
    try:
        aside.mkdir()
        _write_json(aside / "config.json", weights.config)
        for name, contents in weights.files.items():
            (aside / name).write_text(contents, encoding="utf-8")
        write_tensors(aside / "model.safetensors", weights.model.to_hugging_face())
        more(aside)
        aside.rename(target)
    except (OSError, SafetensorError) as error:
        raise unwritable(out, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    remove_others(target)
    return target


def remove_others(newest: Path) -> None:
    """Removes the checkpoints beside the newest one of its kind."""
    for path in checkpoints(newest.parent, newest.name.partition("-")[0]):
        if path != newest:
            shutil.rmtree(path)


def load_config(checkpoint: Path, read_config: Callable[[dict[str, Any]], Any]) -> Any:
    """The config as `read_config` takes it.

    Raises:
        UserError: it is missing, damaged or of another model.
    """
    return read_config(read_json(checkpoint / "config.json"))


def load_model(checkpoint: Path, read_config: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Tensor]]:
    """The config as `read_config` takes it, and the weights in Hugging Face's layout.

    Raises:
        UserError: a file is missing, damaged or of another model, or the weights are in parts.
    """
    config, weights = load_config(checkpoint, read_config), checkpoint / "model.safetensors"
    if in_parts(checkpoint):
        raise UserError(
            f"checkpoint {checkpoint}: expected model.safetensors, but its weights are in parts "
            f"(--checkpoint-format distributed); make them one file with: torchweld gather {checkpoint}"
        )
    return config, _read_tensors(weights)


def in_parts(checkpoint: Path) -> bool:
    """Whether it is of --checkpoint-format distributed."""
    return (checkpoint / PARTS).is_file() and not (checkpoint / "model.safetensors").is_file()


def model_type(checkpoint: Path) -> Any:
    """The model's type, by its config."""
    return read_json(checkpoint / "config.json").get("model_type")


def load_tokenizer(checkpoint: Path, config: Any) -> Tokenizer:
    """The tokenizer of a model of `config`.

    Raises:
        UserError: it is missing, damaged or of another model.
    """
    tokenizer, path = read_tokenizer(checkpoint), checkpoint / "tokenizer.json"
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise damaged(path, f"{tokenizer.get_vocab_size()} tokens for a vocab_size of {config.vocab_size}")
    return tokenizer


def read_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer in a directory, of whatever model.

    Raises:
        UserError: it is missing or damaged.
    """
    path = checkpoint / "tokenizer.json"
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise damaged(path, str(error.strerror)) from None
    except Exception as error:  # tokenizers raises nothing narrower
        raise damaged(path, str(error)) from None


def load_training(checkpoint: Path) -> dict[str, Any]:
    """The contents of training.json.

    Raises:
        UserError: it is missing or damaged.
    """
    path = checkpoint / "training.json"
    training = read_json(path)
    if missing := {"step", "settings", "digest", "losses", "validation"} - training.keys():
        raise damaged(path, f"no {sorted(missing)[0]!r} in it")
    losses = training["losses"]
    if not isinstance(losses, list) or len(losses) != training["step"] or not isinstance(training["settings"], dict):
        raise damaged(path, "contents that contradict each other")
    return training


def load_optimizer(checkpoint: Path) -> dict[str, Tensor]:
    """The contents of optimizer.safetensors.

    Raises:
        UserError: it is missing or damaged.
    """
    return _read_tensors(checkpoint / "optimizer.safetensors")


def unwritable(out: Path, error: BaseException) -> UserError:
    """Says why nothing could be written to `out`."""
    reason = error.strerror if isinstance(error, OSError) else error
    return UserError(f"--out {out}: expected a directory that can be written, but got: {reason}; choose another")


def damaged(path: Path, reason: str) -> UserError:
    """Says what is wrong with a file or folder of a checkpoint."""
    return UserError(
        f"checkpoint file {path}: expected one that `torchweld train` wrote, but got: {reason}; "
        f"the checkpoint is damaged or of another kind"
    )


def as_json(values: dict[str, Any]) -> str:
    """The contents of a file."""
    return json.dumps(values, indent=1) + "\n"


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(as_json(values), encoding="utf-8")


def read_json(path: Path, kind: type = dict) -> Any:
    """The contents of a file of JSON, an object or what `kind` says.

    Raises:
        UserError: it is missing, or damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise damaged(path, str(error.strerror)) from None
    except ValueError as error:
        raise damaged(path, f"no JSON ({error})") from None
    if not isinstance(values, kind):
        raise damaged(path, f"a {type(values).__name__}, not {'an object' if kind is dict else 'a list'}")
    return values


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file of safetensors."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from None
    except SafetensorError as error:
        raise damaged(path, str(error)) from None
