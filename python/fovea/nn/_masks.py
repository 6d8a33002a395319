"""torch.nn's masks, in which True = ignore, as options of fovea.attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fovea.torch._adapter import check_mask, tracing


def options_of(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    query: Tensor,
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_kv: int,
    extra_keys: int,
) -> dict[str, Any]:
    """causal, mask, bias and kv_lengths of a padded batch.

    Args:
        attn_mask: [seqlen_q, seqlen_kv] or [batch * heads, seqlen_q, seqlen_kv].
        key_padding_mask: [batch, seqlen_kv].
        is_causal: attn_mask is the causal triangle, as torch.nn has it: the mask itself is then not read.
        query: whose dtype floating masks may have, instead of float32.
        extra_keys: visible keys behind those that the masks speak of.
    """
    options: dict[str, Any] = {}
    if attn_mask is not None:
        shape = shape_of(attn_mask, batch, heads, seqlen_q, seqlen_kv)
        if shape is None:
            raise ValueError(
                f"attn_mask has the shape {list(attn_mask.shape)} but must be [{seqlen_q}, {seqlen_kv}]"
                f" or [{batch * heads}, {seqlen_q}, {seqlen_kv}]"
            )
        if is_causal and extra_keys == 0:
            options["causal"] = "top_left"
        else:
            check_mask("attn_mask", attn_mask, query)
            if attn_mask.dtype == torch.bool:
                options["mask"] = _with_more((~attn_mask.view(shape)).contiguous(), extra_keys, True)
            else:
                options["bias"] = _with_more(attn_mask.view(shape).contiguous(), extra_keys, 0.0)
    if key_padding_mask is None:
        return options
    if key_padding_mask.shape != (batch, seqlen_kv):
        shape = list(key_padding_mask.shape)
        raise ValueError(f"key_padding_mask has the shape {shape} but must be [{batch}, {seqlen_kv}]")
    check_mask("key_padding_mask", key_padding_mask, query)
    padding = key_padding_mask[:, None, None].contiguous()
    if padding.dtype != torch.bool:
        padding = _with_more(padding, extra_keys, 0.0)
        options["bias"] = options["bias"] + padding if "bias" in options else padding
        return options
    if extra_keys == 0 and seqlen_kv > 0:
        options["kv_lengths"], only_tails = _lengths(key_padding_mask)
        if only_tails:
            return options
    if "mask" not in options:
        options["mask"] = _with_more(~padding, extra_keys, True)
    else:  # a boolean attn_mask leaves the bias free
        hidden = torch.zeros(padding.shape, dtype=torch.float32, device=padding.device).masked_fill(padding, -torch.inf)
        options["bias"] = _with_more(hidden, extra_keys, 0.0)
    return options


def of_one(key_padding_mask: Tensor, seqlen_kv: int) -> Tensor:
    """The key_padding_mask of a single sequence [seqlen_kv], as of a batch of it."""
    if key_padding_mask.shape != (seqlen_kv,):
        shape = list(key_padding_mask.shape)
        raise ValueError(f"key_padding_mask has the shape {shape} but must be [{seqlen_kv}], for there is no batch")
    return key_padding_mask.unsqueeze(0)


def is_triangle(mask: Tensor | None) -> bool:
    """Whether a mask is the causal triangle; looks at its values, where it has any that a trace would not keep."""
    if not isinstance(mask, Tensor) or not has_values(mask) or tracing():
        return False
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    hidden = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, hidden)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(hidden, -torch.inf))


def has_values(mask: Tensor) -> bool:
    """Whether a mask's entries can be looked at, which those of meta and fake tensors cannot."""
    return not (mask.is_meta or isinstance(mask, FakeTensor))


def _lengths(ignore: Tensor) -> tuple[Tensor, bool]:
    """Up to where each sequence has visible keys, and whether it is known that all keys before are visible.

    Only the CPU is asked for that: on a GPU the host would have to wait for the answer.
    """
    keep = ~ignore
    numbers = torch.arange(1, ignore.shape[1] + 1, dtype=torch.int32, device=ignore.device)
    lengths = (keep * numbers).amax(1)
    if ignore.device.type != "cpu" or not has_values(ignore) or torch.compiler.is_compiling() or tracing():
        return lengths, False
    return lengths, torch.equal(lengths, keep.sum(1, dtype=torch.int32))


def shape_of(mask: Tensor, batch: int, heads: int, seqlen_q: int, seqlen_kv: int) -> tuple[int, ...] | None:
    """attn_mask's shape with batch and heads apart; None of one that it may not have."""
    if mask.shape == (seqlen_q, seqlen_kv):
        return (1, 1, seqlen_q, seqlen_kv)
    if mask.shape == (batch * heads, seqlen_q, seqlen_kv):
        return (batch, heads, seqlen_q, seqlen_kv)
    return None


def _with_more(mask: Tensor, extra_keys: int, value: float) -> Tensor:
    return torch.nn.functional.pad(mask, (0, extra_keys), value=value) if extra_keys else mask
