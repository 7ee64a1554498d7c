"""Which parts of attention a process computes with the keys of another, and which keys it needs for them.

A block is a rectangle of queries and keys, with the band that is left of causal and window there. Process r meets the
keys of process r - t at step t. Keys that no query of a process sees are not sent to it: under a causal mask a quarter
of them, under a window all but those of its neighbours.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torchweld.distributed.sequence import Spread


@dataclass(frozen=True)
class Block:
    """Rows [q_begin, q_end) of this process's queries, and rows [k_begin, k_end) of the keys that were received.

    Attributes:
        left, right: the band, -1 where it has no bound; offset: query i stands at key i + offset.
        mask_first, mask_column: the place of the block in the dropout mask of a head.
        key: the place of the first key in the whole sequence.
        starts: where packed sequences start in the block, which then has the same rows as queries and as keys.
    """

    q_begin: int
    q_end: int
    k_begin: int
    k_end: int
    left: int = -1
    right: int = -1
    offset: int = 0
    mask_first: int = 0
    mask_column: int = 0
    key: int = 0
    starts: tuple[int, ...] = ()

    @property
    def queries(self) -> int:
        return self.q_end - self.q_begin

    @property
    def keys(self) -> int:
        return self.k_end - self.k_begin

    @property
    def is_empty(self) -> bool:
        """Whether no query sees a key."""
        before = self.left >= 0 and self.offset - self.left > self.keys - 1
        behind = self.right >= 0 and self.queries - 1 + self.offset + self.right < 0
        return self.queries <= 0 or self.keys <= 0 or before or behind

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        reaches = self.right < 0 or self.offset + self.right >= self.keys - 1
        return reaches and (self.left < 0 or self.queries - 1 + self.offset <= self.left) and not self.starts


@dataclass(frozen=True)
class Band:
    """What a query sees, and whether a block's result depends on its place (ALiBi, bias, dropout) beyond the band."""

    left: int
    right: int
    placed: bool
    starts: tuple[int, ...] | None = None  # cu_seqlens of the whole, if packed


@dataclass(frozen=True)
class Step:
    """The blocks with the keys of process `owner`, of which chunks number `chunks` of its own are sent."""

    owner: int
    chunks: tuple[int, ...]
    blocks: tuple[Block, ...]


def step(spread: Spread, rank: int, owner: int, size: int, band: Band) -> Step:
    """What process `rank` computes with the keys of `owner`; chunks have `size` rows."""
    pairs = []
    for j, b in enumerate(spread.owned(owner)):
        for i, a in enumerate(spread.owned(rank)):
            for block in _pair(a, b, size, band):
                pairs.append((j, replace(block, q_begin=block.q_begin + i * size, q_end=block.q_end + i * size)))
    chunks = tuple(sorted({j for j, _ in pairs}))
    blocks = []
    for j, block in pairs:
        at = chunks.index(j) * size  # chunks that are not sent leave no gap
        blocks.append(replace(block, k_begin=block.k_begin + at, k_end=block.k_end + at))
    if not band.placed:
        own = spread.each * size
        if rank == owner and band.starts is None and band.left < 0 and band.right == 0:
            # Chunks are in the order of the sequence: the causal mask of all of them is one.
            return Step(owner, chunks, (Block(0, own, 0, own, right=0),))
        blocks = _joined(blocks)
    return Step(owner, chunks, tuple(blocks))


def _pair(a: int, b: int, size: int, band: Band) -> list[Block]:
    """The blocks of chunk `a` of the queries and chunk `b` of the keys, in rows of these chunks."""
    first, key = a * size, b * size
    whole = Block(0, size, 0, size, band.left, band.right, first - key, first, key, key)
    if band.starts is not None:
        starts = band.starts
        if a == b:
            cut = [min(max(s - first, 0), size) for s in starts]
            inner = tuple(dict.fromkeys(cut))
            return [replace(whole, offset=0, starts=inner)] if len(inner) > 1 else []
        # One sequence at most reaches from one chunk into another.
        begin, end = min(first, key) + size - 1, max(first, key)
        n = bisect_right(starts, begin) - 1
        if n >= len(starts) - 1 or starts[n + 1] <= end:
            return []
        low, high = starts[n], starts[n + 1]
        q, k = (max(low, first), min(high, first + size)), (max(low, key), min(high, key + size))
        whole = replace(
            whole, q_begin=q[0] - first, q_end=q[1] - first, k_begin=k[0] - key, k_end=k[1] - key, offset=q[0] - k[0]
        )
    if whole.is_empty:
        return []
    return [replace(whole, left=-1, right=-1)] if whole.is_full else [whole]


def _joined(blocks: Sequence[Block]) -> list[Block]:
    """Full blocks that lie beside each other are one."""
    found: list[Block] = []
    for by_keys in (True, False):
        found, rest = [], list(blocks if by_keys else found)
        for block in rest:
            for n, other in enumerate(found):
                if not (block.is_full and other.is_full):
                    continue
                if by_keys and (block.q_begin, block.q_end, block.k_begin) == (other.q_begin, other.q_end, other.k_end):
                    found[n] = replace(other, k_end=block.k_end)
                    break
                if not by_keys and (block.k_begin, block.k_end, block.q_begin) == (
                    other.k_begin,
                    other.k_end,
                    other.q_end,
                ):
                    found[n] = replace(other, q_end=block.q_end)
                    break
            else:
                found.append(block)
        blocks = found
    return found
