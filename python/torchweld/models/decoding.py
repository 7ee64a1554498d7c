"""Text from a decoder, token by token: the cache of keys and values, and the draw."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models.published import Published


class KVCache:
    """The keys and values of the tokens seen so far, for every layer: of `shape` (B, H, most tokens, D)."""

    def __init__(self, layers: int, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.keys = [like.new_empty(shape) for _ in range(layers)]
        self.values = [like.new_empty(shape) for _ in range(layers)]
        self.length = 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (B, H, N, D); returns views of all tokens so far, (B, H, length + N, D)."""
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Goes on with other sequences: row i is what row `rows[i]` (B) was."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[:, :, : self.length] = tensor[rows, :, : self.length]


class Decoder(Published):
    """A model that gives the next token's logits. Its config has n_positions, n_embd, n_layer and n_head."""

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens: (B, N) of int64, after those in `cache`. Returns the final normed stream, (B, N, C)."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the token that follows each position: (..., C) -> (..., V)."""
        raise NotImplementedError

    def cache(self, batch: int) -> KVCache:
        """An empty one for `batch` sequences."""
        config = self.config
        shape = (batch, config.n_head, config.n_positions, config.n_embd // config.n_head)
        return KVCache(config.n_layer, shape, next(self.parameters()))

    def generate(self, tokens: Tensor, count: int, **sampling: Any) -> Tensor:
        """`tokens` (B, N) followed by `count` sampled ones: (B, N + count). `sampling`: as in `stream`."""
        return torch.cat([tokens, *(t[:, None] for t in islice(self.stream(tokens, **sampling), count))], dim=1)

    @torch.no_grad()
    def stream(
        self,
        tokens: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Samples one token after another, without end; the model must be in evaluation mode.

        When the context is full, the older half of it is forgotten, so that the text can be of any length.

        Args:
            tokens: (B, N) of int64, N >= 1.
            temperature: the logits are divided by it; 0 takes the likeliest token.
            top_k: only the k likeliest tokens.
            top_p: only the likeliest tokens that together reach this probability.
            seed: of the draws; None for torch's own random state.
            use_cache: keep keys and values, instead of running the whole context for each token.

        Yields:
            The next token of each sequence, (B).
        """
        check_sampling(tokens, temperature, top_k, top_p)
        self.check_whole("generate")
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        limit = self.config.n_positions
        context, cache = tokens[:, -limit:], None
        fresh = context  # the tokens that the cache has not seen
        while True:
            if use_cache and cache is None:
                cache = self.cache(tokens.shape[0])
            last = self.hidden(fresh if use_cache else context, cache)[:, -1]
            token = sample(self.logits(last), temperature, top_k, top_p, generator)
            yield token
            fresh = token[:, None]
            if context.shape[1] == limit:
                cache = None
                fresh = context = torch.cat([context[:, limit - limit // 2 :], fresh], dim=1)
            else:
                context = torch.cat([context, fresh], dim=1)


def check_sampling(tokens: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises UserError on arguments of `Decoder.stream` that have no meaning."""
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise UserError(f"generate: tokens: expected shape (batch, at least 1), but got {tuple(tokens.shape)}")
    if not 0.0 <= temperature < math.inf:
        raise UserError(f"generate: temperature: expected a finite number >= 0, but got {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"generate: top_k: expected at least 1, but got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise UserError(f"generate: top_p: expected a number in (0, 1], but got {top_p}")


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Draws one token from each row: (B, V) -> (B)."""
    if temperature < 1e-6:  # also where the division below would overflow
        return logits.argmax(-1)
    # Sorted, "the k likeliest" and "the likeliest that reach p" are both a prefix.
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0.0
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= top_p * probabilities.sum(-1, keepdim=True)] = 0.0
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]
