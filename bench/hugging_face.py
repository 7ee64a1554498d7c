"""Models of Hugging Face transformers on the CPU: stock beside patched, inference and a training step.

    python bench/hugging_face.py [--memory both|ours|default] [--rounds 7] [MODEL ...]

Four layers each, from configs, with dropout as the configs have it: BERT (8 x 128 tokens, padded), GPT-2 and a Llama
(2 x 256), ViT (4 images), T5 (4 x 128 and 64). Stock takes `torch.optim.AdamW(fused=True)`, ours
`torchweld.optim.AdamW`. Each side is a process of its own, so that each has its own malloc; they are called in turn,
and a ratio is the median over rounds, above 1 where torchweld is faster. `--memory` says which side calls
`torchweld.keep_memory()`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from torch import Tensor

import torchweld
from torchweld import optim

Batch = dict[str, Tensor]
DTYPES = (torch.float32, torch.bfloat16)


def _words(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(vocabulary, shape)


def bert() -> tuple[Any, Batch]:
    config = transformers.BertConfig(num_hidden_layers=4)
    lengths = torch.tensor([128, 100, 90, 128, 60, 128, 77, 20])
    mask = (torch.arange(128) < lengths[:, None]).long()
    batch = {"input_ids": _words(30000, 8, 128), "attention_mask": mask, "labels": _words(2, 8)}
    return transformers.BertForSequenceClassification(config), batch


def gpt2() -> tuple[Any, Batch]:
    tokens = _words(50257, 2, 256)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=4))
    return model, {"input_ids": tokens, "labels": tokens}


def llama() -> tuple[Any, Batch]:
    tokens = _words(32000, 2, 256)
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(vocab_size=32000, num_hidden_layers=4, **sizes)
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


def vit() -> tuple[Any, Batch]:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=4))
    return model, {"pixel_values": torch.randn(4, 3, 224, 224), "labels": _words(2, 4)}


def t5() -> tuple[Any, Batch]:
    config = transformers.T5Config(d_model=512, num_layers=4, num_decoder_layers=4, decoder_start_token_id=0)
    batch = {"input_ids": _words(32000, 4, 128), "labels": _words(32000, 4, 64)}
    return transformers.T5ForConditionalGeneration(config), batch


MODELS: dict[str, Callable[[], tuple[Any, Batch]]] = {"bert": bert, "gpt2": gpt2, "llama": llama, "vit": vit, "t5": t5}


def serve(pipe: Connection, name: str, dtype: torch.dtype, ours: bool, keep: bool, threads: int) -> None:
    """A process with one side: answers "inference" and "training step" by the seconds of one."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if keep:
        torchweld.keep_memory()
    model, batch = MODELS[name]()
    model.to(dtype)
    batch = {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()}
    if ours:
        torchweld.patch(model)
    optimizer = (
        optim.AdamW(model.parameters(), 1e-5) if ours else torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    )

    def inference() -> None:
        model.eval()
        with torch.inference_mode():
            model(**batch)

    def training_step() -> None:
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    calls = {"inference": inference, "training step": training_step}
    while (asked := pipe.recv()) is not None:
        began = time.perf_counter()
        calls[asked]()
        pipe.send(time.perf_counter() - began)


def compare(name: str, dtype: torch.dtype, memory: str, rounds: int) -> dict[str, tuple[float, float]]:
    """By call, how many times stock's time is ours, and our seconds."""
    start = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for ours in (True, False):
        here, there = start.Pipe()
        keep = memory == "both" or (memory == "ours" and ours)
        work = partial(serve, there, name, dtype, ours, keep, torch.get_num_threads())
        processes.append(start.Process(target=work, daemon=True))
        processes[-1].start()
        there.close()  # the process has its own: if it ends, recv says so
        pipes.append(here)

    def seconds(side: int, call: str) -> float:
        pipes[side].send(call)
        return float(pipes[side].recv())

    found = {}
    for call in ("inference", "training step"):
        times: tuple[list[float], list[float]] = ([], [])
        for n in range(rounds + 1):
            for side in (0, 1) if n % 2 else (1, 0):
                times[side].append(seconds(side, call))
        ratios = [stock / ours for ours, stock in zip(times[0][1:], times[1][1:], strict=True)]  # the first: warm-up
        found[call] = statistics.median(ratios), statistics.median(times[0][1:])
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"any of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--memory", choices=("both", "ours", "default"), default="both")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in MODELS]:
        parser.error(f"expected any of {', '.join(MODELS)}, but got {', '.join(unknown)}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    for name in options.models or MODELS:
        for dtype in DTYPES:
            found = compare(name, dtype, options.memory, options.rounds)
            shown = (f"{call} {ratio:4.2f}x ({ours * 1e3:4.0f} ms)" for call, (ratio, ours) in found.items())
            print(f"{name:6} {str(dtype).removeprefix('torch.'):9}", *shown, sep="  ", flush=True)


if __name__ == "__main__":
    main()
