"""Checkpoints whose tensors no process has whole: every process writes its parts, and reads what it needs of them.

    model/*.safetensors optimizer/*.safetensors    the parts, by torch.distributed.checkpoint in its format of
                                                   safetensors, so that reading them runs nobody's pickled code
    parts.json                                     the program whose they are
    config.json training.json tokenizer.json       as in any checkpoint

Names are those of our parameters, shapes those of one process. So any number of processes reads them in any layout.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from torchweld.models.published import Published
from torchweld.training import checkpoint, optimizer_state
from torchweld.training.optimizers import choice
from torchweld.training.processes import Processes
from torchweld.training.sharing import Sharing

Tensors = Mapping[str, Tensor]


def of_model(model: Published, sharing: Sharing) -> dict[str, Tensor]:
    """This process's parts of the weights, by name."""
    return {name: sharing.part(model, name, t) for name, t in model.state_dict().items()}


def of_optimizer(model: Published, optimizer: torch.optim.Optimizer, sharing: Sharing) -> dict[str, Tensor]:
    """This process's parts of an optimizer's state, by parameter and name."""
    return optimizer_state.tensors_of(model, optimizer, lambda name, t: sharing.part(model, name, t))


def save(out: Path, name: str, files: Mapping[str, str], parts: Mapping[str, Tensors], processes: Processes) -> Path:
    """Writes OUT/`name`: aside, then renamed by the first process when all are through, which then removes older ones.

    All processes call this, and must see the same folder.

    Args:
        files: contents of text by name.
        parts: tensors by the name of their folder.

    Raises:
        UserError: in all processes, where one of them could not write; what was there is as it was.
    """
    target = out / name

    def begin() -> Path | None:
        if target.exists():  # written by this run at this very step
            return None
        aside = out / f".{name}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)  # left by one that was killed and had the same number
        try:
            aside.mkdir()
            for each, contents in files.items():
                (aside / each).write_text(contents, encoding="utf-8")
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise checkpoint.unwritable(out, error) from None
        return aside

    def end() -> None:
        assert aside is not None
        try:
            aside.rename(target)
        except OSError as error:
            raise checkpoint.unwritable(out, error) from None
        checkpoint.remove_others(target)

    aside = processes.by_first(begin)
    if aside is None:
        return target
    try:
        for folder, tensors in parts.items():
            _write(aside / folder, tensors, out, alone=processes.count == 1)
        processes.by_first(end)
    finally:
        if processes.first:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def load_model(source: Path, model: Published, sharing: Sharing, alone: bool = False) -> None:
    """Reads the weights of a checkpoint; all processes call this, or one `alone`.

    Raises:
        UserError: they are missing, damaged or of another model.
    """
    parts = of_model(model, sharing)
    read(source / "model", parts, alone or sharing.processes.count == 1)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            t.copy_(sharing.own_part(model, name, parts[name]))


def load_optimizer(
    source: Path, model: Published, sharing: Sharing, optimizer: torch.optim.Optimizer, name: str
) -> None:
    """Reads the state of the optimizer `name`.

    Raises:
        UserError: it is missing, damaged or of another model or optimizer.
    """
    parts = empty_state(model, sharing, name)
    read(source / "optimizer", parts, sharing.processes.count == 1)
    optimizer_state.restore(model, optimizer, name, parts, lambda parameter, t: sharing.own_part(model, parameter, t))


def empty_state(model: Published, sharing: Sharing, name: str) -> dict[str, Tensor]:
    """Zeros in the places of what `of_optimizer` gives of the optimizer `name`."""
    kept, found = choice(name), dict[str, Tensor]()
    for parameter, p in model.named_parameters():
        found |= {f"{parameter}/{key}": torch.zeros(()) for key in kept.scalars}
        part = sharing.part(model, parameter, p.detach())
        found |= {f"{parameter}/{key}": torch.zeros_like(part) for key in kept.wide}
    return found


def read(directory: Path, tensors: Tensors, alone: bool) -> None:
    """Fills `tensors`, plain or DTensors, from what any number of processes wrote; all call this, or one `alone`.

    Raises:
        UserError: files are missing or damaged, or hold tensors of other names or shapes.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # noqa: PLC0415  (slow to import)
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_loader import load  # noqa: PLC0415

    if not directory.is_dir():
        raise checkpoint.damaged(directory, "No such file or directory")
    reader = HuggingFaceStorageReader(str(directory))
    try:
        stored = reader.read_metadata().state_dict_metadata
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise checkpoint.damaged(directory, str(error)) from None
    _check(directory, tensors, stored)
    try:
        with _quiet():
            load(dict(tensors), storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        raise checkpoint.damaged(directory, str(_reason(error))) from None


def _check(directory: Path, tensors: Tensors, stored: Mapping[str, Any]) -> None:
    """Raises UserError unless the files hold every number of every tensor, and no others."""
    if odd := sorted(tensors.keys() ^ stored.keys()):
        missing = odd[0] in tensors
        raise checkpoint.damaged(directory, f"no {odd[0]!r} in it" if missing else f"{odd[0]!r}, which is unknown")
    for name, t in tensors.items():
        there = sum({chunk.offsets: chunk.sizes.numel() for chunk in stored[name].chunks}.values())
        if stored[name].size == t.shape and there != t.numel():
            raise checkpoint.damaged(directory, f"{there} of the {t.numel()} numbers of {name!r}: a file is missing")
        if stored[name].size != t.shape:
            sizes = f"{list(stored[name].size)} in place of {list(t.shape)}"
            raise checkpoint.damaged(directory, f"{name!r} of shape {sizes}: a file is missing, or of another model")


def _write(directory: Path, tensors: Tensors, out: Path, alone: bool) -> None:
    from torch.distributed.checkpoint.api import CheckpointException  # noqa: PLC0415
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_saver import save  # noqa: PLC0415

    writer = HuggingFaceStorageWriter(path=str(directory), save_distributed=True)
    try:
        with _quiet():
            save(dict(tensors), storage_writer=writer, no_dist=alone)
    except CheckpointException as error:
        raise checkpoint.unwritable(out, _reason(error)) from None


def _reason(error: Any) -> BaseException:
    """Of the errors in all processes the first."""
    reason: BaseException = next(iter(error.failures.values()))[0]
    return reason


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, torch neither warns that one process is alone nor logs errors that are raised anyway."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield
    finally:
        logger.setLevel(level)


def gather(source: Path, model: Published, alone: Sharing, optimizer: str | None) -> None:
    """Makes the parts of a checkpoint whole, in its folder, in one process that is alone.

    Interrupted anywhere, the checkpoint is as good as before: the parts count until model.safetensors is there.

    Args:
        model: a fresh one of its config.
        alone: that of one process.
        optimizer: the name of what optimizer/ is of, if there is one.

    Raises:
        UserError: the parts are damaged, or the files cannot be written.
    """
    state = {} if optimizer is None else empty_state(model, alone, optimizer)
    if optimizer is not None:
        read(source / "optimizer", state, alone=True)
    load_model(source, model, alone)
    tensors = {"optimizer": state} if optimizer is not None else {}
    for name, each in {**tensors, "model": model.to_hugging_face()}.items():
        aside = source / f".{name}.safetensors-{os.getpid()}"
        try:
            checkpoint.write_tensors(aside, each)
            aside.rename(source / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            raise checkpoint.unwritable(source, error) from None
        finally:
            aside.unlink(missing_ok=True)
    for name in ("model", "optimizer"):
        shutil.rmtree(source / name, ignore_errors=True)
    (source / checkpoint.PARTS).unlink()
