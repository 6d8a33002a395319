"""flash_attn's public functions, with its arguments and meaning, on the CPU as well as on GPUs, in fp32 too.

Causal masks start from the bottom right corner, windows are (left, right) with -1 for unbounded, ALiBi slopes are fp32
[num_heads] or [batch, num_heads]. Head dims go to 512, gradients flow through lse as well, and dropout draws its seed
from PyTorch's default generator.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fovea.torch import _adapter
from fovea.torch._ops import in_rows

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

_Window = Sequence[int] | Tensor
_Result = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """Attention over padded batches.

    Args:
        q: [batch, seqlen_q, num_heads, head_dim], fp32, fp16 or bf16.
        k: [batch, seqlen_kv, num_kv_heads, head_dim]; num_heads is a multiple of num_kv_heads.
        v: [batch, seqlen_kv, num_kv_heads, head_dim_v].
        dropout_p: 0 in evaluation.
        softmax_scale: default 1 / sqrt(head_dim).
        causal: from the bottom right corner.
        window_size: (left, right) keys around the diagonal; -1: unbounded.
        softcap: 0: none.
        alibi_slopes: fp32 [num_heads] or [batch, num_heads].
        deterministic: the same bits in every backward pass.
        return_attn_probs: return (out, lse, None).

    Returns:
        out [batch, seqlen_q, num_heads, head_dim_v], or with return_attn_probs (out, lse, None) with lse fp32 [batch,
        num_heads, seqlen_q].

    Raises:
        ValueError: in one sentence.
        TypeError: a causal that is neither True nor False.
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _attend(q, k, v, None, None, None, None, *options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """flash_attn_func with kv [batch, seqlen_kv, 2, num_kv_heads, head_dim]."""
    k, v = _parts("kv", kv, 5, 2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _attend(q, k, v, None, None, None, None, *options)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """flash_attn_func with qkv [batch, seqlen, 3, num_heads, head_dim]."""
    q, k, v = _parts("qkv", qkv, 5, 3)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _attend(q, k, v, None, None, None, None, *options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> _Result:
    """Attention over packed sequences.

    Args:
        q: [total_q, num_heads, head_dim]; sequence b is its rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        k: [total_kv, num_kv_heads, head_dim].
        v: [total_kv, num_kv_heads, head_dim_v].
        cu_seqlens_q: int32 [batch + 1].
        cu_seqlens_k: int32 [batch + 1].
        max_seqlen_q: the longest sequence of q.
        max_seqlen_k: the longest of k and v.
        block_table: paged key/value memory, which Fovea does not have yet.

    The other arguments are flash_attn_func's; lse is [num_heads, total_q].

    Raises:
        ValueError: in one sentence.
        NotImplementedError: a block_table.
    """
    if block_table is not None:
        raise NotImplementedError(
            "block_table asks for paged keys and values, which Fovea does not have yet; gather them"
        )
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """flash_attn_varlen_func with kv [total_kv, 2, num_kv_heads, head_dim]."""
    k, v = _parts("kv", kv, 4, 2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """flash_attn_varlen_func with qkv [total, 3, num_heads, head_dim]."""
    q, k, v = _parts("qkv", qkv, 4, 3)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _attend(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *options)


def _parts(name: str, packed: Tensor, rank: int, count: int) -> tuple[Tensor, ...]:
    """q, k and v out of one tensor, as views."""
    _adapter.only_tensors(**{name: packed})
    if packed.dim() != rank or packed.shape[-3] != count:
        shape = "batch, seqlen" if rank == 5 else "total"
        raise ValueError(
            f"{name} has the shape {list(packed.shape)} but must be [{shape}, {count}, num_heads, head_dim]"
        )
    return packed.unbind(-3)


def _sides(window_size: _Window) -> list[int | None]:
    """window_left and window_right of fovea.attention."""
    try:
        # To torch.compile operator.index makes a constant of a number, for each of which it would compile again.
        left, right = (side if type(side) is int else operator.index(side) for side in window_size)
    except (TypeError, ValueError):
        raise ValueError(f"window_size ({window_size!r}) must be (left, right), two whole numbers") from None
    return [None if side < 0 else side for side in (left, right)]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_kv: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_kv: int | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: _Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> Any:
    _adapter.only_tensors(q=q, k=k, v=v)
    left, right = _sides(window_size)
    result = _adapter.attention(
        in_rows(q),
        in_rows(k),
        in_rows(v),
        softmax_scale=softmax_scale,
        causal="bottom_right" if _adapter.flag("causal", causal) else None,
        window_left=left,
        window_right=right,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        dropout_p=dropout_p,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_kv=max_seqlen_kv,
        deterministic=deterministic,
        return_lse=return_attn_probs,
    )
    return (*result, None) if return_attn_probs else result
