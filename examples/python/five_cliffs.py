#!/usr/bin/env python3
"""Five places where PyTorch's fused attention stops, what PyTorch says of it, and the same call with Fovea.

    python3 five_cliffs.py

Read it from top to bottom: every step prints what it found, and checks it.  Runs on any CPU in a few seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fovea
import fovea.torch

torch.manual_seed(0)


def what_torch_says(call: Callable[[], Any]) -> str:
    """The call with nothing but the fused kernel allowed: the reasons that PyTorch warns with, or an empty text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                call()
            return ""
        except RuntimeError as error:
            reasons = [str(warning.message).partition(" (Triggered")[0] for warning in caught]
            return " ".join([*reasons, str(error)])


def step(title: str, theirs: Callable[[], Any], ours: Callable[[], Any], same: bool = True) -> None:
    """One cliff: PyTorch's words, then Fovea's result, held against PyTorch's N×N formula."""
    print(f"\n── {title}")
    said = what_torch_says(theirs)
    assert said, f"{title}: PyTorch has a fused kernel for this now; find another cliff"
    print(f"PyTorch: {said}")
    out = ours()
    if same:
        with sdpa_kernel(SDPBackend.MATH):
            apart = (out - theirs()).abs().max().item()
        print(f"Fovea:   out {list(out.shape)}, {apart:.1e} away from PyTorch's formula")
        assert apart < 1e-5, apart
    else:
        print(f"Fovea:   out {list(out.shape)}")


# Everything below starts from these: [batch, heads, sequence, dim], PyTorch's order.
q, k, v = (torch.randn(2, 4, 256, 64) for _ in range(3))

# 1. A bias that learns.  A float mask is fine as long as it is a constant; a relative position bias is not.
bias = torch.randn(1, 4, 256, 256, requires_grad=True)
step(
    "a bias with a gradient",
    lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
    lambda: fovea.torch.scaled_dot_product_attention(q, k, v, attn_mask=bias),
)
(dbias,) = torch.autograd.grad(fovea.torch.scaled_dot_product_attention(q, k, v, attn_mask=bias).sum(), bias)
print(f"         and the bias's gradient, {list(dbias.shape)}, without an N×N matrix of weights in between")

# 2. Dropout.  Fovea draws its seed from PyTorch's generator: the same seed drops the same entries.
step(
    "dropout",
    lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1),
    lambda: fovea.torch.scaled_dot_product_attention(q, k, v, dropout_p=0.1),
    same=False,
)
torch.manual_seed(1)
first = fovea.torch.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
torch.manual_seed(1)
assert torch.equal(first, fovea.torch.scaled_dot_product_attention(q, k, v, dropout_p=0.1))
print("         torch.manual_seed(1) twice: the same bits twice")

# 3. Values of another size than queries and keys.
narrow = v[..., :48]
step(
    "v with its own head dim",
    lambda: F.scaled_dot_product_attention(q, k, narrow),
    lambda: fovea.torch.scaled_dot_product_attention(q, k, narrow),
)

# 4. A ragged batch.  PyTorch's jagged tensors are Fovea's packed sequences: nothing is padded, nothing is copied.
lengths = (40, 256, 7)
ragged = torch.nested.nested_tensor([torch.randn(n, 4, 64) for n in lengths], layout=torch.jagged).transpose(1, 2)
step(
    "a ragged batch",
    lambda: F.scaled_dot_product_attention(ragged, ragged, ragged),
    lambda: fovea.torch.scaled_dot_product_attention(ragged, ragged, ragged).transpose(1, 2).values(),
    same=False,
)

# 5. No batch dimension.  Three dimensions mean the same to PyTorch, and cost it the fused kernel.
step(
    "three dimensions",
    lambda: F.scaled_dot_product_attention(q[0], k[0], v[0]),
    lambda: fovea.torch.scaled_dot_product_attention(q[0], k[0], v[0]),
)

# What PyTorch cannot say without an N×N mask at all: a window, from the corner that is named.
out = fovea.attention(q, k, v, layout="bhsd", causal="bottom_right", window_left=64, sink=torch.zeros(4))
print(f"\n── causal, a window of 64 keys and a sink\nFovea:   out {list(out.shape)}")

# Who runs it, and why the others do not.  The first line can be pasted behind `fovea check` and `fovea bench`.
print(f"\n── explain\n{fovea.explain(q, k, v, layout='bhsd', causal='bottom_right', window_left=64)}")

# A model that knows nothing of Fovea.
model = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True)
with fovea.torch.replace_sdpa() as report:
    model(torch.randn(2, 32, 64), src_key_padding_mask=torch.arange(32) >= torch.tensor([[32], [20]])).sum().backward()
print(f"── replace_sdpa\n{report}")
