"""`torchweld classify`: what a fine-tuned BERT says of each line of a file, or of standard input; a ViT of images, an
AST of recordings.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models import ast
from torchweld.models.bert import BERTConfig, BERTForSequenceClassification
from torchweld.training import checkpoint, recognition, speech
from torchweld.training.lines import batches, opened
from torchweld.training.machine import forced_backend, pick_device
from torchweld.training.packing import encode, pack
from torchweld.training.tagging import ARCHITECTURE


def read_config(values: dict[str, Any]) -> BERTConfig:
    """From the contents of a classifier's config.json."""
    config = BERTConfig.from_hugging_face(values)
    if not config.labels:
        raise UserError("config.json: expected a model of `torchweld fine-tune` with id2label, but got one without")
    if ARCHITECTURE in (values.get("architectures") or []):
        raise UserError("config.json: expected a model that labels texts, but got one that tags words: `torchweld tag`")
    return config


@torch.no_grad()
def answers(
    model: BERTForSequenceClassification, tokenizer: Tokenizer, texts: list[str], device: str
) -> Iterator[dict[str, Any]]:
    """For each text {"score": number}, or {"label": name, "probability": number}; without a text nothing is said."""
    said = [text for text in texts if text.strip()]
    results: Iterator[Tensor] = iter(())
    if said:
        tokens, bounds = (tensor.to(device) for tensor in pack(encode(tokenizer, said)))
        results = iter(model(tokens, torch.zeros_like(tokens), bounds).float().cpu())
    for text in texts:
        if not text.strip():
            yield {}
        elif model.config.regression:
            yield {"score": round(next(results).item(), 4)}
        else:
            probabilities: Tensor = next(results).softmax(0)
            best = int(probabilities.argmax())
            yield {"label": model.config.labels[best], "probability": round(probabilities[best].item(), 4)}


def run(args: argparse.Namespace) -> int:
    """Writes a line for each line that it reads, with tabs between the parts."""
    directory = checkpoint.locate(Path(args.checkpoint), to_use=True)
    kind = checkpoint.model_type(directory)
    if kind == "vit":
        return recognition.classify(args, directory)
    if kind == ast.MODEL_TYPE:
        return speech.classify(args, directory)
    if len(args.file) > 1:
        raise UserError(f"FILE: expected one file of texts, but got {len(args.file)}")
    device = pick_device(args.device)
    config, weights = checkpoint.load_model(directory, read_config)
    tokenizer = checkpoint.load_tokenizer(directory, config)
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.max_position_embeddings)
    with forced_backend(args.backend, device), opened(args.file[0] if args.file else "-") as lines:
        model = BERTForSequenceClassification(config).eval()
        model.load_hugging_face(weights)
        model.to(device)
        for texts in batches(lines):
            for text, answer in zip(texts, answers(model, tokenizer, texts, device), strict=True):
                if args.json:
                    sys.stdout.write(json.dumps({"text": text, **answer}, ensure_ascii=False) + "\n")
                else:
                    sys.stdout.write("\t".join([*map(str, answer.values()), text]) + "\n")
            sys.stdout.flush()
    return 0
