"""CUDA kernels of torchweld."""

from torchweld._cpu import GRAD_NORM_BLOCKS as GRAD_NORM_BLOCKS
from torchweld._cpu import OPTIMIZER_TABLE_WORDS as OPTIMIZER_TABLE_WORDS
from torchweld._cpu import AdamWLists as AdamWLists
from torchweld._cpu import AdamWOptions as AdamWOptions
from torchweld._cpu import Modifiers as Modifiers
from torchweld._cpu import Norm as Norm
from torchweld._cpu import Options as Options
from torchweld._cpu import PagedOptions as PagedOptions
from torchweld._cpu import Rotation as Rotation
from torchweld._cpu import SgdLists as SgdLists
from torchweld._cpu import SgdOptions as SgdOptions
from torchweld._cpu import Step as Step
from torchweld._cpu import Tables as Tables
from torchweld._cpu import adamw_ as adamw_
from torchweld._cpu import attention_backward as attention_backward
from torchweld._cpu import attention_forward as attention_forward
from torchweld._cpu import cross_entropy_backward as cross_entropy_backward
from torchweld._cpu import cross_entropy_forward as cross_entropy_forward
from torchweld._cpu import dropout as dropout
from torchweld._cpu import gated_backward as gated_backward
from torchweld._cpu import gated_forward as gated_forward
from torchweld._cpu import gelu_backward as gelu_backward
from torchweld._cpu import gelu_forward as gelu_forward
from torchweld._cpu import grad_norm as grad_norm
from torchweld._cpu import layer_norm_backward as layer_norm_backward
from torchweld._cpu import layer_norm_forward as layer_norm_forward
from torchweld._cpu import layer_norm_forward_workspace as layer_norm_forward_workspace
from torchweld._cpu import layer_norm_workspace as layer_norm_workspace
from torchweld._cpu import leaves_wide_output as leaves_wide_output
from torchweld._cpu import paged_attention as paged_attention
from torchweld._cpu import rotary_embedding as rotary_embedding
from torchweld._cpu import sgd_ as sgd_

def architectures() -> str: ...
def runtime_version() -> str: ...
def driver_version() -> str | None: ...
def unavailable() -> str | None: ...
