"""fovea.attention for JAX's arrays."""

from __future__ import annotations

from typing import Any

from fovea._arguments import KEYWORDS
from fovea.jax._attention import attention as _attention


def attention(q: Any, k: Any, v: Any, *options: Any) -> Any:
    """fovea.attention, whose defaults have been filled in."""
    given = dict(zip(KEYWORDS, options, strict=True))
    if given.pop("out") is not None:
        raise ValueError("out cannot be given: JAX's arrays are not written; take the one that is returned")
    if given.pop("strict"):
        raise ValueError("strict is not offered for JAX's arrays; name the backend instead")
    return _attention(q, k, v, **given)
