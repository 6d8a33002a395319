"""The arguments of a call, grouped as the compiled half takes them."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from fovea import _core
from fovea._frameworks import refuse_masked

#: What fovea.attention takes after q, k and v, in the order in which its adapters get it.
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

#: The arrays among them that are read, as `extras` has them.
ARRAYS = ("mask", "bias", "alibi_slopes", "sink", "q_lengths", "kv_lengths", "cu_seqlens_q", "cu_seqlens_kv")

#: What `rules` takes, in its order.
RULES = (
    "softmax_scale",
    "causal",
    "window_left",
    "window_right",
    "softcap",
    "dropout_p",
    "deterministic",
    "layout",
    "backend",
    "strict",
)

#: Of what types each is, None among them where it may be left out; a bool is no number.
_NUMBER, _WHOLE = (float, int), (int,)
KINDS: dict[str, tuple[type, ...]] = {
    "softmax_scale": (*_NUMBER, type(None)),
    "causal": (str, type(None)),
    "window_left": (*_WHOLE, type(None)),
    "window_right": (*_WHOLE, type(None)),
    "softcap": _NUMBER,
    "dropout_p": _NUMBER,
    "deterministic": (bool,),
    "layout": (str,),
    "backend": (str, type(None)),
    "strict": (bool,),
}
#: What each is where it is left out.
PLAINEST = dict(zip(RULES, (None, None, None, None, 0.0, 0.0, False, "bshd", None, False), strict=True))


def rules(*options: Any) -> _core.Rules:
    """The compiled half's checked options that are no tensors; equal ones share one object."""
    try:
        return _shared(*options)
    except TypeError:
        return _core.Rules(*numbers(*options))


@lru_cache(maxsize=1024, typed=True)  # typed: False == 0.0 and 3 == 3.0, but they are checked differently
def _shared(*options: Any) -> _core.Rules:
    if any(hasattr(option, "__dlpack__") for option in options):
        raise TypeError("an array's value may change, and the cache would not see it")
    return _core.Rules(*options)


def numbers(*options: Any) -> tuple[Any, ...]:
    """What `rules` takes, with arrays replaced by their numbers."""
    return tuple(now(name, option) for name, option in zip(RULES, options, strict=True))


def why_not(name: str, option: Any) -> str:
    """The sentence in which the compiled half refuses this option, or ""."""
    try:
        rules(*(PLAINEST | {name: option}).values())
    except ValueError as error:
        return str(error)
    return ""


def longest(name: str, number: Any) -> Any:
    """Checks a longest length as the compiled half would."""
    if isinstance(number, bool) or not hasattr(number, "__index__") or not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} ({number!r}) must be a whole number of 64 bits")
    return number


def now(name: str, value: Any) -> Any:
    """The number in an array as it is now (it may change before the backward pass); other values as they are."""
    return _number(name, value) if hasattr(value, "__dlpack__") else value


def whole(name: str, number: Any) -> Any:
    """Checks a seed or offset as the compiled half would, before it becomes a tensor."""
    integral = isinstance(number, int) or hasattr(number, "__index__")
    if isinstance(number, bool) or not integral or not 0 <= number < 2**64:
        raise ValueError(f"{name} ({number}) must be a whole number from 0 to 2^64 - 1")
    return number


def _number(name: str, array: Any) -> Any:
    if getattr(array, "requires_grad", False):
        import torch

        if torch.is_grad_enabled():
            raise ValueError(
                f"{name} wants a gradient, which a number does not get: give {name}.item(), or multiply q by a scale"
                " that learns"
            )
    refuse_masked(type(array))
    if math.prod(array.shape) != 1:
        raise ValueError(f"{name} has the shape {list(array.shape)} but must be one number")
    return array.item()


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
    """What belongs to the arrays of a call besides q, k and v, or None where there is nothing."""
    if (
        mask is None
        and bias is None
        and alibi_slopes is None
        and sink is None
        and q_lengths is None
        and kv_lengths is None
        and cu_seqlens_q is None
        and cu_seqlens_kv is None
        and max_seqlen_q is None
        and max_seqlen_kv is None
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
