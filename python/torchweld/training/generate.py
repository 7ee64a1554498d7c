"""Text from a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from torchweld.errors import UserError
from torchweld.models import GPT2, GPT3, GPT2Config, GPT3Config
from torchweld.models.decoding import Decoder
from torchweld.training import checkpoint
from torchweld.training.corpus import end_of_text
from torchweld.training.lines import check_unicode
from torchweld.training.machine import forced_backend, pick_device


def read_config(values: dict[str, Any]) -> GPT2Config:
    """That of a GPT-2 or a GPT-3, from the contents of config.json."""
    if (kind := values.get("model_type")) not in ("gpt2", "gpt_neo"):
        raise UserError(f"config.json: model_type: expected 'gpt2' or 'gpt_neo', but got {kind!r}")
    return (GPT2Config if kind == "gpt2" else GPT3Config).from_hugging_face(values)


def continuation(model: Decoder, tokenizer: Tokenizer, prompt: str, count: int, **sampling: Any) -> Iterator[str]:
    """Pieces of text that follow `prompt`: at most `count` tokens, fewer if the model ends the document.

    A piece is whole characters, so it can be of several tokens. `sampling`: as in `Decoder.stream`.
    """
    end = end_of_text(tokenizer)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [end]
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    decoder = DecodeStream(skip_special_tokens=True)
    for token in islice(model.stream(tokens, **sampling), count):
        if (drawn := int(token)) == end:
            return
        if piece := decoder.step(tokenizer, drawn):
            yield piece


def run(args: argparse.Namespace) -> int:
    """`torchweld generate`."""
    device = pick_device(args.device)
    check_unicode("--prompt", [args.prompt])
    directory = checkpoint.locate(Path(args.checkpoint), to_use=True)
    config, weights = checkpoint.load_model(directory, read_config)
    tokenizer = checkpoint.load_tokenizer(directory, config)
    with forced_backend(args.backend, device):
        model = (GPT3 if isinstance(config, GPT3Config) else GPT2)(config).eval()
        model.load_hugging_face(weights)
        model.to(device)
        sys.stdout.write(args.prompt)
        sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
        for piece in continuation(model, tokenizer, args.prompt, args.tokens, **sampling):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    return 0
