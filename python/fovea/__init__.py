"""Fovea: exact attention and its gradients, in tiles, for everything that speaks DLPack.

    import fovea
    out = fovea.attention(q, k, v, causal="bottom_right")    # torch, NumPy, CuPy and JAX arrays
    print(fovea.explain(q, k, v, causal="bottom_right"))     # who runs it, and why the others do not

Submodules, imported when they are first used: ``fovea.torch`` (PyTorch's scaled_dot_product_attention, and
``replace_sdpa`` for unmodified models), ``fovea.nn`` (torch.nn's attention layers), ``fovea.flash_attn`` (flash_attn's
functions), ``fovea.jax``.
"""

# A submodule is called `torch`, so that this name is never PyTorch here; the same holds for `jax`.
from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

from fovea import _core
from fovea._arguments import extras as _extras
from fovea._arguments import rules as _rules
from fovea._core import Report, __version__

# Without the submodules: `from fovea import *` would put one in the place of the caller's `torch`, and import JAX.
__all__ = ["Report", "__version__", "attention", "explain"]

_SUBMODULES = ("flash_attn", "jax", "nn", "torch")

#: The attention function for each type of arrays but PyTorch's; filled as types are met.
_adapters: dict[type, Callable[..., Any]] = {}
#: The one for PyTorch's.
_torch_adapter: Callable[..., Any] | None = None

#: A framework's type of arrays: the results are of what q, k and v are.
_Array = TypeVar("_Array")


class _Options(TypedDict, total=False):
    """What attention takes whatever it returns, for those who check types."""

    softmax_scale: float | None
    causal: str | None
    window_left: int | None
    window_right: int | None
    mask: Any
    bias: Any
    alibi_slopes: Any
    sink: Any
    softcap: float
    dropout_p: float
    seed: int | None
    offset: int
    q_lengths: Any
    kv_lengths: Any
    cu_seqlens_q: Any
    cu_seqlens_kv: Any
    max_seqlen_q: int | None
    max_seqlen_kv: int | None
    deterministic: bool
    layout: str
    out: Any
    backend: str | None
    strict: bool


@overload
def attention(
    q: _Array, k: _Array, v: _Array, *, return_lse: Literal[False] = False, **options: Unpack[_Options]
) -> _Array: ...
@overload
def attention(
    q: _Array, k: _Array, v: _Array, *, return_lse: Literal[True], **options: Unpack[_Options]
) -> tuple[_Array, _Array]: ...
@overload
def attention(
    q: _Array, k: _Array, v: _Array, *, return_lse: bool, **options: Unpack[_Options]
) -> _Array | tuple[_Array, _Array]: ...
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    softmax_scale: float | None = None,
    causal: str | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    sink: Any = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    deterministic: bool = False,
    layout: str = "bshd",
    return_lse: bool = False,
    out: Any = None,
    backend: str | None = None,
    strict: bool = False,
) -> Any:
    """Exact attention in tiles: softmax(q kᵀ · softmax_scale + ...) v without the N×N matrix.

    Arrays may be PyTorch's (with autograd), NumPy's, CuPy's or JAX's, on the CPU or an NVIDIA GPU; nothing is copied,
    and work on a GPU is queued in the framework's current stream. All options compose, forward and backward.

    Args:
        q: [batch, seqlen_q, num_q_heads, head_dim], fp32, fp16 or bf16; any strides with the last dimension contiguous.
        k: [batch, seqlen_kv, num_kv_heads, head_dim], q's dtype; num_q_heads is a multiple of num_kv_heads.
        v: [batch, seqlen_kv, num_kv_heads, head_dim_v], q's dtype.
        softmax_scale: default 1 / sqrt(head_dim).
        causal: "top_left" (PyTorch's corner) or "bottom_right" (flash_attn's); None: not causal.
        window_left: keys further than this before the diagonal are hidden; None: unbounded.
        window_right: keys further than this after the diagonal are hidden; None: unbounded.
        mask: bool, True = keep; broadcasts to [batch, num_q_heads, seqlen_q, seqlen_kv].
        bias: fp32 or q's dtype, added to the scaled scores; broadcasts like mask; differentiable.
        alibi_slopes: fp32 [num_q_heads] or [batch, num_q_heads]: adds -slope * |i + offset - j|; differentiable.
        sink: fp32 [num_q_heads], one more logit a row with no value; differentiable.
        softcap: scores become softcap * tanh(score / softcap); 0: none.
        dropout_p: probability of dropping a weight, in [0, 1).
        seed: of dropout, 0 to 2^64 - 1; None: drawn from PyTorch's default generator of q's device. Other frameworks
            must give it.
        offset: of dropout's random numbers; belongs to a seed that is given.
        q_lengths: int32 [batch]; rows past the length give 0.
        kv_lengths: int32 [batch]; keys past the length are hidden.
        cu_seqlens_q: int32 [batch + 1]: packed sequences; q is [total_q, num_q_heads, head_dim].
        cu_seqlens_kv: int32 [batch + 1], together with cu_seqlens_q; k and v are [total_kv, num_kv_heads, ...].
        max_seqlen_q: the longest packed sequence; needed on a GPU.
        max_seqlen_kv: likewise of k and v.
        deterministic: the same bits in every run, backward too.
        layout: "bshd" as above, or "bhsd": q, k, v and out are [batch, heads, seqlen, dim].
        return_lse: also return the logarithm of the softmax denominator.
        out: array to write instead of a new one; not for tensors that need gradients.
        backend: run this backend ("cpu_avx2", "cuda_portable", "reference", ...) or fail.
        strict: fail rather than pass over a backend that this device has.

    Returns:
        out [batch, seqlen_q, num_q_heads, head_dim_v] in q's dtype, or with return_lse (out, lse) with lse fp32
        [batch, num_q_heads, seqlen_q] (packed: [num_q_heads, total_q]). Rows that see no key: out 0, lse -inf.

    Raises:
        ValueError: an argument breaks the contract; one sentence with the offending value.
        RuntimeError: no allowed backend runs the call (with every reason), or the device failed.
    """
    if hasattr(q, "__torch_function__"):
        adapter = _torch_adapter or _load_torch()
    else:
        adapter = _adapters.get(type(q)) or _find_adapter(type(q))
    return adapter(
        q,
        k,
        v,
        softmax_scale,
        causal,
        window_left,
        window_right,
        mask,
        bias,
        alibi_slopes,
        sink,
        softcap,
        dropout_p,
        seed,
        offset,
        q_lengths,
        kv_lengths,
        cu_seqlens_q,
        cu_seqlens_kv,
        max_seqlen_q,
        max_seqlen_kv,
        deterministic,
        layout,
        return_lse,
        out,
        backend,
        strict,
    )


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    backward: bool = False,
    softmax_scale: float | None = None,
    causal: str | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    sink: Any = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    deterministic: bool = False,
    layout: str = "bshd",
    return_lse: bool = False,
    out: Any = None,
    backend: str | None = None,
    strict: bool = False,
) -> Report:
    """Who would run this call of :func:`attention`, how, and for each backend that would not, why; nothing is computed.

    Args:
        q: [batch, seqlen_q, num_q_heads, head_dim], and all others, as attention takes them; seed, offset, return_lse
            and out decide nothing.
        backward: ask for the pass of the gradients.

    Returns:
        A report to print(), or to read: `backend`, `reasons`, `details`, `workspace_bytes`, and `problem`, the line
        that the fovea command takes.

    Raises:
        ValueError: as attention does.
    """
    others = _extras(
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
    numbers = (softmax_scale, causal, window_left, window_right, softcap, dropout_p, deterministic)
    if hasattr(q, "__torch_function__"):
        from fovea.torch._adapter import explain as of_torch

        return of_torch(bool(backward), q, k, v, others, numbers, layout, backend, strict, out)
    return _core.explain(bool(backward), q, k, v, others, _rules(*numbers, layout, backend, strict))


def _load_torch() -> Callable[..., Any]:
    """The adapter for PyTorch's tensors.  Under torch.compile no global that was read before may change."""
    from fovea.torch._adapter import attention, is_dynamo_compiling

    if not is_dynamo_compiling():
        global _torch_adapter
        _torch_adapter = attention
    return attention


def _find_adapter(array_type: type) -> Callable[..., Any]:
    """The adapter for a type of arrays that has not been seen before."""
    roots = {base.__module__.partition(".")[0] for base in array_type.__mro__}
    if roots & {"jax", "jaxlib"}:
        from fovea.jax._adapter import attention as adapter
    else:
        from fovea._arrays import attention as adapter
    _adapters[array_type] = adapter
    return adapter


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        try:
            return importlib.import_module(f"fovea.{name}")
        except ModuleNotFoundError as error:  # hasattr and getattr with a default go by AttributeError
            raise AttributeError(f"fovea.{name} needs the package {error.name}, which is not installed") from error
    raise AttributeError(f"module 'fovea' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})


if sys.modules.get("torch") is not None:  # None where somebody forbids its import
    _load_torch()
