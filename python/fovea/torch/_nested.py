"""Jagged nested tensors as packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling


def unpack(
    q: Tensor, k: Tensor, v: Tensor, layout: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, Callable[[Tensor], Tensor]]:
    """q, k, v as [total, heads, dim], their cu_seqlens and longest lengths, and what makes an out nested again.

    q, k and v are jagged: [batch, seqlen*, heads, dim], or [batch, heads, seqlen*, dim] in layout "bhsd".
    """
    given = (("q", q), ("k", k), ("v", v))
    for name, tensor in given:
        _check_kind(name, tensor)
    for name, tensor in given:
        check_jagged(name, tensor, 1 if layout == "bshd" else 2)
    if layout != "bshd":
        q, k, v = (tensor.transpose(1, 2) for _, tensor in given)
    offsets = q.offsets()
    # No method calls: to torch.compile a length of 0 or 1 is a constant, which it takes from attributes alone.
    shortest, longest = q._min_seqlen, q._max_seqlen
    check_lengths("k", k.offsets(), "v", v.offsets())
    longest_kv = longest if k.offsets() is offsets else k._max_seqlen

    def nested(out: Tensor) -> Tensor:
        jagged = torch.nested.nested_tensor_from_jagged(out, offsets, min_seqlen=shortest, max_seqlen=longest)
        return jagged if layout == "bshd" else jagged.transpose(1, 2)

    cu_seqlens_q = offsets.to(torch.int32)
    cu_seqlens_kv = cu_seqlens_q if k.offsets() is offsets else k.offsets().to(torch.int32)
    return q.values(), k.values(), v.values(), cu_seqlens_q, cu_seqlens_kv, longest, longest_kv, nested


def check_lengths(key_name: str, key_offsets: Tensor, value_name: str, value_offsets: Tensor) -> None:
    """Refuses keys and values of different lengths.

    Offsets that are two tensors have to be read, which waits for a GPU; where somebody traces they cannot be.
    """
    if not (key_offsets is value_offsets or is_compiling() or torch.equal(key_offsets, value_offsets)):
        raise ValueError(
            f"{key_name} and {value_name} are nested tensors of different lengths; give every key its value"
        )


def check_jagged(name: str, tensor: Tensor, dimension: int) -> None:
    """Refuses a jagged tensor whose values are not rows one behind the other, in that dimension."""
    if tensor.lengths() is not None:
        raise ValueError(f"{name} is a jagged tensor with holes; make it contiguous first")
    if tensor._ragged_idx != dimension:
        raise ValueError(f"{name} is jagged in dimension {tensor._ragged_idx} but must be in {dimension}; transpose it")


def heads(tensor: Tensor) -> int | None:
    """How many heads a jagged tensor [batch, heads, seqlen*, dim] has; None of any other, which `unpack` refuses."""
    jagged = tensor.is_nested and tensor.layout == torch.jagged and tensor.dim() == 4 and tensor._ragged_idx == 2
    return tensor.shape[1] if jagged else None


def named(error: ValueError, q: Tensor, k: Tensor, v: Tensor) -> ValueError:
    """A refusal, or why strided nested tensors are refused; asked afterwards, so that other calls do not pay for it."""
    try:
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if isinstance(tensor, Tensor) and tensor.is_nested:
                _check_kind(name, tensor)
    except ValueError as better:
        return better
    return error


def _check_kind(name: str, tensor: Any) -> None:
    if not tensor.is_nested or tensor.layout != torch.jagged:
        raise ValueError(
            f"{name} must be a nested tensor of layout torch.jagged like the others;"
            " make it so by torch.nested.nested_tensor(..., layout=torch.jagged)"
        )
    if tensor.dim() != 4:
        raise ValueError(f"{name} has {tensor.dim()} dimensions but must be [batch, seqlen*, heads, dim]")
