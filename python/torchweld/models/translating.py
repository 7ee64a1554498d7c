"""Targets from an encoder-decoder, token by token: greedy, or the best of several that grow side by side (beam search).

Keys and values are kept: each target's own in a cache, and those of the sources, which all targets of one source share.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchweld.errors import UserError
from torchweld.models.decoding import KVCache
from torchweld.models.seq2seq import END, CrossAttention, KeysValues, Seq2Seq, Sources
from torchweld.models.sequences import arrange


class State(NamedTuple):
    """What a decoder keeps while its targets grow.

    Attributes:
        cache: keys and values of the targets.
        sources: the encoder's output.
        read: its keys and values, of each layer.
        targets: the arrangement of one token of each target; those of one source are side by side.
    """

    cache: KVCache
    sources: Sources
    read: list[KeysValues]
    targets: Any


def begin(model: Seq2Seq, source: Tensor, cu_seqlens: Tensor, copies: int, most: int) -> State:
    """For `copies` targets of each source, of at most `most` tokens; the sources are as in `Seq2Seq.encode`."""
    model.check_whole("generate")
    sources, config = model.encode(source, cu_seqlens), model.config
    count, heads = len(cu_seqlens) - 1, config.decoder_attention_heads
    cache = KVCache(config.decoder_layers, (count * copies, heads, most, config.d_model // heads), sources.hidden)
    bounds = torch.arange(count + 1, dtype=torch.int32, device=source.device) * copies
    read = [attention.read(sources.hidden) for attention in _cross_attentions(model)]
    return State(cache, sources, read, arrange(bounds, model.ops))


def _cross_attentions(model: Seq2Seq) -> list[CrossAttention]:
    return [module for module in model.decoder.modules() if isinstance(module, CrossAttention)]


def step(model: Seq2Seq, tokens: Tensor, state: State) -> Tensor:
    """Log-probabilities in float32 of what follows one more token of each target: (R) -> (R, V)."""
    at = torch.full_like(tokens, state.cache.length)
    x = model.decoder(model.shared(tokens), at, state.targets, state.sources, state)
    state.cache.length += 1
    return model.logits(state.targets.gather(x)).float().log_softmax(-1)


@torch.no_grad()
def generate(
    model: Seq2Seq,
    source: Tensor,
    cu_seqlens: Tensor,
    most: Tensor | None = None,
    *,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """The targets' tokens without </s>; the model must be in evaluation mode.

    Args:
        source, cu_seqlens: (S) and (B + 1), as in `Seq2Seq.encode`.
        most: how many tokens a target may have, (B) of int64; the config's positions if None.
        beams: 1 takes the likeliest token each time; else so many targets of each source grow side by side.
        length_penalty: the best target is that of the largest log-probability / length^length_penalty.

    Raises:
        UserError: an argument that has no meaning.
    """
    count, vocabulary, limit = len(cu_seqlens) - 1, model.config.vocab_size, model.config.max_position_embeddings
    if not 1 <= beams <= vocabulary // 2:
        raise UserError(f"translate: beams: expected 1 to {vocabulary // 2}, half of the vocabulary, but got {beams}")
    if not math.isfinite(length_penalty):
        raise UserError(f"translate: length_penalty: expected a finite number, but got {length_penalty}")
    if count == 0:
        return []
    if most is None:
        most = torch.full((count,), limit, device=source.device)
    elif most.shape != (count,) or not 1 <= int(most.min()) <= int(most.max()) <= limit:
        raise UserError(f"translate: most: expected {count} lengths of 1 to {limit} tokens, but got {most.tolist()}")
    state = begin(model, source, cu_seqlens, beams, int(most.max()))
    rows = _greedy(model, state, most) if beams == 1 else _beam(model, state, most, beams, length_penalty)
    return [_until_end(row[:length]) for row, length in zip(rows.tolist(), most.tolist(), strict=True)]


def _until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END)] if END in tokens else tokens


def _greedy(model: Seq2Seq, state: State, most: Tensor) -> Tensor:
    """The likeliest token each time: (B, length), </s> and what follows it included."""
    token = torch.full_like(most, model.config.decoder_start_token_id)
    ended, found = torch.zeros_like(most, dtype=torch.bool), []
    while not ended.all():
        token = step(model, token, state).argmax(-1)
        found.append(token)
        ended |= (token == END) | (len(found) >= most)
    return torch.stack(found, dim=1)


def _beam(model: Seq2Seq, state: State, most: Tensor, beams: int, penalty: float) -> Tensor:
    """The best of `beams` targets: (B, length), filled up with </s>.

    As `transformers` does by default: a source is done when its best open target, at its present length, is no better
    than the worst of `beams` finished ones.
    """
    count, device = len(most), most.device
    first = torch.arange(count, device=device)[:, None] * beams  # the row of each source's first target
    tokens = torch.full((count, beams, 0), END, device=device)
    scores = torch.full((count, beams), -math.inf, device=device)
    scores[:, 0] = 0.0  # all begin alike, so one of them stands for all
    finished, rewards = tokens, torch.full_like(scores, -math.inf)
    last = torch.full((count * beams,), model.config.decoder_start_token_id, device=device)
    undecided, length = torch.ones_like(most, dtype=torch.bool)[:, None], 0
    while undecided.any():
        length += 1
        totals = scores[:, :, None] + step(model, last, state).unflatten(0, (count, beams))
        # Of twice as many candidates at least `beams` do not end.
        best, index = totals.flatten(1).topk(2 * beams)
        origin, token = index // totals.shape[-1], index % totals.shape[-1]
        grown = torch.cat([_rows(tokens, origin), token[:, :, None]], dim=-1)
        ends = (token == END) | (length >= most)[:, None]

        rank = torch.arange(2 * beams, device=device)
        reward = (best / length**penalty).masked_fill(~(ends & undecided & (rank < beams)), -math.inf)
        rewards, chosen = torch.cat([rewards, reward], dim=1).topk(beams)
        finished = _rows(torch.cat([F.pad(finished, (0, 1), value=END), grown], dim=1), chosen)

        scores, chosen = best.masked_fill(ends, -math.inf).topk(beams)
        tokens, origin = _rows(grown, chosen), origin.gather(1, chosen)
        last = tokens[:, :, -1].flatten()
        state.cache.select((origin + first).flatten())
        undecided = undecided & (scores[:, :1] / length**penalty > rewards[:, -1:])
    return finished[:, 0]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Of each source the targets `index`: (B, N, length), (B, M) -> (B, M, length)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))


@torch.no_grad()
def alignment(model: Seq2Seq, source: Tensor, inputs: Tensor) -> Tensor:
    """How much each token of a target attends to each of its source, a mean over the last layer's heads: (T, S)."""
    found: list[Tensor] = []

    def look(module: CrossAttention, args: tuple[Any, ...], output: Tensor) -> None:
        x, _, _, (keys, _) = args
        q, k = module.q_proj(x).unflatten(-1, (-1, module.head_size)).flatten(0, -3), keys.flatten(0, -3)
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
        found.append(scores.float().softmax(-1).mean(0))

    with _cross_attentions(model)[-1].register_forward_hook(look):
        bounds = [torch.tensor([0, len(t)], dtype=torch.int32, device=t.device) for t in (source, inputs)]
        model(source, bounds[0], inputs, bounds[1])
    return found[0]
