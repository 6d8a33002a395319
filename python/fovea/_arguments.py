"""The arguments of a call, grouped as the compiled half takes them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fovea import _core

#: What fovea.attention takes after q, k and v, in the order in which its doors get it.
KEYWORDS = (
    "softmax_scale",
    "causal",
    "window_left",
    "window_right",
    "mask",
    "bias",
    "alibi_slopes",
    "sink",
    "softcap",
    "dropout_p",
    "seed",
    "offset",
    "q_lengths",
    "kv_lengths",
    "cu_seqlens_q",
    "cu_seqlens_kv",
    "max_seqlen_q",
    "max_seqlen_kv",
    "deterministic",
    "layout",
    "return_lse",
    "out",
    "backend",
    "strict",
)

#: The compiled half's checked options that are no tensors; equal ones share one object.
rules = lru_cache(maxsize=1024)(_core.Rules)


def extras(
    mask: Any,
    bias: Any,
    alibi_slopes: Any,
    sink: Any,
    q_lengths: Any,
    kv_lengths: Any,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any,
    max_seqlen_q: Any,
    max_seqlen_kv: Any,
) -> tuple[Any, ...] | None:
    """The arrays of a call besides q, k and v, or None where there are none."""
    if (
        mask is None
        and bias is None
        and alibi_slopes is None
        and sink is None
        and q_lengths is None
        and kv_lengths is None
        and cu_seqlens_q is None
        and cu_seqlens_kv is None
    ):
        return None
    return (
        mask,
        bias,
        alibi_slopes,
        sink,
        q_lengths,
        kv_lengths,
        cu_seqlens_q,
        cu_seqlens_kv,
        max_seqlen_q,
        max_seqlen_kv,
    )
