"""torchweld on several devices: sequences spread over them. DTensors need nothing from here: every op takes them."""

from torchweld.distributed.attention import all_to_all_attention, ring_attention
from torchweld.distributed.context import context_parallel
from torchweld.distributed.sequence import gather_sequence, sequence_positions, shard_sequence

__all__ = [
    "all_to_all_attention",
    "context_parallel",
    "gather_sequence",
    "ring_attention",
    "sequence_positions",
    "shard_sequence",
]
