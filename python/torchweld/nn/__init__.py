"""Drop-ins that subclass torch.nn: same constructor, same state_dict, only `forward` is ours."""

from torchweld.nn.attention import MultiheadAttention
from torchweld.nn.layer_norm import LayerNorm

__all__ = ["LayerNorm", "MultiheadAttention"]
