"""`torchweld fill-mask`: the words that a BERT expects at each [MASK]."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models.bert import BERTConfig, BERTForPreTraining
from torchweld.training import checkpoint
from torchweld.training.corpus import MASK, special_token
from torchweld.training.machine import forced_backend, pick_device

MOST_MASKS = 20
_NOT_NEEDED = ("bert.pooler.", "cls.seq_relationship.")  # a masked language model has them not


def load(model: BERTForPreTraining, state: Mapping[str, Tensor]) -> None:
    """The weights of a BertForPreTraining or a BertForMaskedLM.

    Raises:
        UserError: they are another model's.
    """
    if not any(name.startswith("cls.predictions.") for name in state):
        raise UserError(
            "model.safetensors: expected a BERT that was trained on masked words, but got one without cls.predictions"
        )
    fresh = {name: tensor for name, tensor in model.to_hugging_face().items() if name.startswith(_NOT_NEEDED)}
    model.load_hugging_face({**fresh, **state})


@torch.no_grad()
def expected(model: BERTForPreTraining, tokenizer: Tokenizer, text: str, count: int) -> list[list[tuple[str, float]]]:
    """For each [MASK] in `text` the `count` likeliest words and their probabilities.

    Raises:
        UserError: there is none, there are too many, or the text is too long.
    """
    ids, mask = torch.tensor(tokenizer.encode(text).ids), special_token(tokenizer, MASK)
    places = (ids == mask).nonzero()[:, 0]
    if not 1 <= len(places) <= MOST_MASKS:
        raise UserError(f"TEXT: expected 1 to {MOST_MASKS} times {MASK}, but got {len(places)} in {text!r}")
    ids = ids.to(model.bias.device)
    hidden = model.bert(ids, torch.zeros_like(ids), torch.tensor([0, len(ids)], dtype=torch.int32, device=ids.device))
    probabilities = model.words(hidden[places.to(ids.device)]).float().softmax(1)
    best = probabilities.topk(min(count, probabilities.shape[1]))
    return [
        [(str(tokenizer.id_to_token(word)), value) for word, value in zip(words, values, strict=True)]
        for words, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def run(args: argparse.Namespace) -> int:
    """Writes a line for each [MASK]: its words, the likeliest first."""
    device = pick_device(args.device)
    directory = checkpoint.locate(Path(args.checkpoint), to_use=True)
    config, weights = checkpoint.load_model(directory, BERTConfig.from_hugging_face)
    tokenizer = checkpoint.load_tokenizer(directory, config)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    with forced_backend(args.backend, device):
        model = BERTForPreTraining(config).eval()
        load(model, weights)
        model.to(device)
        answers = [expected(model, tokenizer, text, args.top) for text in args.text]
        for text, found in zip(args.text, answers, strict=True):
            if args.json:
                masks = [[{"word": word, "probability": round(p, 4)} for word, p in words] for words in found]
                sys.stdout.write(json.dumps({"text": text, "masks": masks}, ensure_ascii=False) + "\n")
            else:
                for words in found:
                    sys.stdout.write("\t".join(f"{word} {p:.3f}" for word, p in words) + "\n")
    return 0
