"""The fused Triton kernel: one read of o_proj's input leaves updated moments of every head.

Installed as `fastheads.kernels`. Importing it imports triton; `import fastheads` does not import it.
"""

from .config import Config
from .factor import KernelFactor
from .launch import Launch, head_stats, prepare, token_norms, unsupported
from .residual_norms import inverse_norms

__all__ = [
    "Config",
    "KernelFactor",
    "Launch",
    "head_stats",
    "inverse_norms",
    "prepare",
    "token_norms",
    "unsupported",
]
