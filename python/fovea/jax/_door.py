"""fovea.attention for JAX's arrays."""

from __future__ import annotations

from typing import Any

from fovea.jax._attention import attention as _attention


def attention(
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: float | None,
    causal: str | None,
    window_left: int | None,
    window_right: int | None,
    mask: Any,
    bias: Any,
    alibi_slopes: Any,
    sink: Any,
    softcap: float,
    dropout_p: float,
    seed: Any,
    offset: int,
    q_lengths: Any,
    kv_lengths: Any,
    cu_seqlens_q: Any,
    cu_seqlens_kv: Any,
    max_seqlen_q: int | None,
    max_seqlen_kv: int | None,
    deterministic: bool,
    layout: str,
    return_lse: bool,
    out: Any,
    backend: str | None,
    strict: bool,
) -> Any:
    """fovea.attention, whose defaults have been filled in."""
    if out is not None:
        raise ValueError("out cannot be given: JAX's arrays are not written; take the one that is returned")
    if strict:
        raise ValueError("strict is not offered for JAX's arrays; name the backend instead")
    return _attention(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sink=sink,
        softcap=softcap,
        dropout_p=dropout_p,
        seed=seed,
        offset=offset,
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_kv=max_seqlen_kv,
        deterministic=deterministic,
        layout=layout,
        return_lse=return_lse,
        backend=backend,
    )
