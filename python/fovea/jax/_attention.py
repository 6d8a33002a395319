"""fovea.jax.attention: one foreign call forward, one backward, tied together by custom_vjp."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from fovea import _core
from fovea._arguments import longest, rules, whole
from fovea._frameworks import refuse_masked

_TARGET = "fovea_attention"
for _handler, _platform in zip(_core.xla_handlers(), ("cpu", "CUDA")):
    jax.ffi.register_ffi_target(_TARGET, _handler, platform=_platform)

#: What JAX's functions take for an array; what a transform traces is a jax.Array.
_ARRAYS = (jax.Array, np.ndarray, np.generic, bool, int, float)
#: In the order of arguments and of their gradients.
_DIFFERENTIABLE = ("q", "k", "v", "bias", "alibi_slopes", "sink")


class _Static(NamedTuple):
    """What a compiled call is specialised for besides shapes."""

    options: str  # in the words of a problem line
    layout: str
    backend: str
    max_seqlen_q: int
    max_seqlen_kv: int


class _Options(TypedDict, total=False):
    """What attention takes whatever it returns, for those who check types."""

    softmax_scale: float | None
    causal: str | None
    window_left: int | None
    window_right: int | None
    mask: jax.Array | None
    bias: jax.Array | None
    alibi_slopes: jax.Array | None
    sink: jax.Array | None
    softcap: float
    dropout_p: float
    seed: int | jax.Array | None
    offset: int
    q_lengths: jax.Array | None
    kv_lengths: jax.Array | None
    cu_seqlens_q: jax.Array | None
    cu_seqlens_kv: jax.Array | None
    max_seqlen_q: int | None
    max_seqlen_kv: int | None
    deterministic: bool
    layout: str
    backend: str | None


@overload
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, return_lse: Literal[False] = False, **options: Unpack[_Options]
) -> jax.Array: ...
@overload
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, return_lse: Literal[True], **options: Unpack[_Options]
) -> tuple[jax.Array, jax.Array]: ...
@overload
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, return_lse: bool, **options: Unpack[_Options]
) -> jax.Array | tuple[jax.Array, jax.Array]: ...
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    softmax_scale: float | None = None,
    causal: str | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    sink: jax.Array | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | jax.Array | None = None,
    offset: int = 0,
    q_lengths: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    cu_seqlens_q: jax.Array | None = None,
    cu_seqlens_kv: jax.Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    deterministic: bool = False,
    layout: str = "bshd",
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """fovea.attention for JAX: jit, grad and value_and_grad work; arguments and results are fovea.attention's.

    Args:
        q: [batch, seqlen_q, num_q_heads, head_dim], float32, float16 or bfloat16.
        k: [batch, seqlen_kv, num_kv_heads, head_dim].
        v: [batch, seqlen_kv, num_kv_heads, head_dim_v].
        seed: must be given with dropout: a Python integer, which jit compiles in, or on the CPU a uint32 array [2] such
            as jax.random.key_data(key), which may change from call to call.

    Numbers, words and flags are static under jit. Gradients flow to q, k, v, bias, alibi_slopes and sink, through out
    and lse, once.

    Raises:
        ValueError: an option of the wrong kind.
        jax.errors.JaxRuntimeError: everything that shapes and values break, in the library's sentence; JAX makes a
            ValueError of it where the compiled call has run before.
    """
    rules(softmax_scale, causal, window_left, window_right, softcap, dropout_p, deterministic, layout, backend, False)
    arrays = dict(
        q=q,
        k=k,
        v=v,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sink=sink,
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
    )
    for name, array in arrays.items():
        if array is None and name not in ("q", "k", "v"):
            continue
        refuse_masked(type(array))
        if not (isinstance(array, _ARRAYS) or hasattr(array, "__jax_array__")):
            raise ValueError(f"{name} is a {type(array).__name__}, which is no array to JAX: give one of jax.numpy")
        # To the library a tensor of no dimensions is one that is not there.
        if name not in ("mask", "bias") and jnp.ndim(array) == 0:
            raise ValueError(f"{name} has no dimensions; give an array that has some")
    words = _words(softmax_scale, causal, window_left, window_right, softcap, deterministic)
    if dropout_p:
        words.append(f"dropout={np.float32(dropout_p)}")
        if seed is None:
            raise ValueError(f"dropout_p ({dropout_p}) needs a seed: JAX has no default generator to draw one from")
        offset = int(whole("offset", offset))
        if isinstance(seed, (int, np.integer)):
            words += [f"seed={int(whole('seed', seed))}", f"offset={offset}"]
        else:
            halves = jnp.array([offset % 2**32, offset // 2**32], jnp.uint32)
            arrays["seed"] = jnp.concatenate([_key_data(seed), halves])
    lengths = (_length("max_seqlen_q", max_seqlen_q), _length("max_seqlen_kv", max_seqlen_kv))
    static = _Static(" ".join(words), layout, backend or "", *lengths)
    out, lse = _attend(static, {name: array for name, array in arrays.items() if array is not None})
    return (out, lse) if return_lse else out


def _key_data(seed: Any) -> jax.Array:
    """Both halves of a seed that is an array; conversions would make another seed of what is none."""
    if getattr(seed, "shape", None) != (2,) or seed.dtype != jnp.uint32:
        given = f"{seed.dtype} {list(seed.shape)}" if hasattr(seed, "dtype") else repr(seed)
        raise ValueError(
            f"seed ({given}) must be a whole number from 0 to 2^64 - 1 or uint32 [2], such as jax.random.key_data(key)"
        )
    return jnp.asarray(seed)


def _length(name: str, number: Any) -> int:
    """A longest length as it travels; 0 is none."""
    return 0 if number is None else operator.index(longest(name, number))


def _words(
    softmax_scale: float | None,
    causal: str | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    deterministic: bool,
) -> list[str]:
    """Options as tokens of a problem line; numbers as fp32 prints them, which is what the line holds."""
    words = []
    if causal is not None:
        words.append(f"causal={causal}")
    if window_left is not None or window_right is not None:
        words.append("window=" + ",".join("-" if side is None else str(side) for side in (window_left, window_right)))
    if softcap:
        words.append(f"softcap={np.float32(softcap)}")
    if softmax_scale is not None:
        words.append(f"scale={np.float32(softmax_scale)}")
    if deterministic:
        words.append("deterministic")
    return words


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    q, v = arrays["q"], arrays["v"]
    if q.ndim == 3:
        lse_shape = (q.shape[1], q.shape[0])
    elif q.ndim == 4 and static.layout == "bshd":
        lse_shape = (q.shape[0], q.shape[2], q.shape[1])
    else:  # "bhsd", or what the library refuses
        lse_shape = q.shape[:3]
    for name, size in zip(("num_q_heads", "batch"), lse_shape[-2::-1]):
        if size == 0:  # XLA leaves out a call whose results are empty, and the library's refusal with it
            raise jax.errors.JaxRuntimeError(f"INVALID_ARGUMENT: {name} (0) must be at least 1")
    results = {
        "out": jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype),
        "lse": jax.ShapeDtypeStruct(lse_shape, jnp.float32),
    }
    return _call("fwd", static, arrays, results)


def _forward(static: _Static, arrays: dict[str, jax.Array]) -> tuple[Any, Any]:
    out, lse = _attend(static, arrays)
    return (out, lse), (arrays, out, lse)


def _backward(static: _Static, saved: Any, gradients: tuple[jax.Array, jax.Array]) -> tuple[dict[str, Any]]:
    arrays, out, lse = saved
    dout, dlse = gradients
    results = {
        f"d{name}": jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype)
        for name in _DIFFERENTIABLE
        if name in arrays
    }
    written = _call("bwd", static, arrays | {"out": out, "lse": lse, "dout": dout, "dlse": dlse}, results)
    by_name = dict(zip(results, written))
    return ({name: by_name.get(f"d{name}") for name in arrays},)


_attend.defvjp(_forward, _backward)


def _call(which: str, static: _Static, arrays: dict[str, jax.Array], results: dict[str, Any]) -> Any:
    call = jax.ffi.ffi_call(_TARGET, tuple(results.values()), vmap_method="sequential")
    return call(
        *arrays.values(),
        arguments=",".join(arrays),
        results=",".join(results),
        options=static.options,
        layout=static.layout,
        backend=static.backend,
        max_seqlen_q=str(static.max_seqlen_q),
        max_seqlen_kv=str(static.max_seqlen_kv),
        **{"pass": which},
    )
