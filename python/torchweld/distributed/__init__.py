"""torchweld on several devices: layers and sequences spread over them. DTensors need nothing from here."""

from torchweld.distributed.attention import all_to_all_attention, ring_attention
from torchweld.distributed.context import context_parallel
from torchweld.distributed.plans import tensor_parallel
from torchweld.distributed.sequence import gather_sequence, sequence_positions, shard_sequence
from torchweld.distributed.whole import full_parameter, local_parameter, ordered_parameter, spread_parameter

__all__ = [
    "all_to_all_attention",
    "context_parallel",
    "full_parameter",
    "gather_sequence",
    "local_parameter",
    "ordered_parameter",
    "ring_attention",
    "sequence_positions",
    "shard_sequence",
    "spread_parameter",
    "tensor_parallel",
]
