"""attention for arrays that are neither PyTorch's nor JAX's: NumPy, CuPy and whatever speaks DLPack on the CPU."""

from __future__ import annotations

from typing import Any

from fovea import _core
from fovea._arguments import extras, rules


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
    seed: int | None,
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
    arrays = {"k": k, "v": v, "bias": bias, "alibi_slopes": alibi_slopes, "sink": sink, "out": out}
    for name, array in arrays.items():
        if getattr(array, "requires_grad", False):
            _refuse_gradients(name, q)
    call_rules = rules(
        softmax_scale, causal, window_left, window_right, softcap, dropout_p, deterministic, layout, backend, strict
    )
    if dropout_p and seed is None:
        raise ValueError(
            f"dropout_p ({dropout_p}) needs a seed with {type(q).__name__} arrays, which have no default generator"
            " to draw one from: give seed="
        )
    others = extras(
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
    return _core.forward(q, k, v, others, call_rules, seed, offset, bool(return_lse), out)


def _refuse_gradients(name: str, q: Any) -> None:
    """For a tensor of PyTorch's beside q of another framework, which would lose its gradient."""
    import torch

    if torch.is_grad_enabled():
        kind = type(q).__name__
        raise ValueError(f"{name} wants gradients, but q is a {kind}, which has none; give q as a PyTorch tensor, too")
