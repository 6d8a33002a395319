"""Fovea for PyTorch: scaled_dot_product_attention, and replace_sdpa for models as they are.

fovea.attention takes PyTorch's tensors by itself, with autograd, torch.compile and torch.export.
"""

from fovea.torch._ops import attention as attention_op
from fovea.torch._replace import Replacement, replace_sdpa
from fovea.torch._sdpa import scaled_dot_product_attention

__all__ = ["Replacement", "attention_op", "replace_sdpa", "scaled_dot_product_attention"]
