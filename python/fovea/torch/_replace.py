"""replace_sdpa: unmodified models on Fovea, with a report of what was replaced and what was left."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fovea.torch import _adapter
from fovea.torch._sdpa import scaled_dot_product_attention

_original = torch.nn.functional.scaled_dot_product_attention
_lock = threading.RLock()
_active: list[Replacement] = []
_fast_path = True
_patched: list[tuple[Any, str]] = []
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Replacement:
    """What replace_sdpa() gives: a context manager, a decorator, and its report.

    Attributes:
        replaced: how often Fovea ran, by the call's description.
        left: how often PyTorch ran, by (description, reason).
    """

    def __init__(self) -> None:
        self.replaced: Counter[str] = Counter()
        self.left: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> Replacement:
        with _lock:
            if not _active:
                _patch()
            _active.append(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        with _lock:
            _active.remove(self)
            if not _active:
                _restore()

    def __call__(self, function: _Function) -> _Function:
        kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if any(kind(function) for kind in kinds):
            raise ValueError(
                f"{function.__qualname__} runs when its call has returned, and would run on PyTorch; use"
                " `with replace_sdpa():` inside it"
            )

        @functools.wraps(function)
        def on_fovea(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return on_fovea  # type: ignore[return-value]

    def report(self) -> str:
        """Several lines: what ran on Fovea, what stayed with PyTorch, and why."""
        lines = [
            f"Fovea ran {self.replaced.total()} calls of scaled_dot_product_attention, PyTorch {self.left.total()}."
        ]
        lines += [f"  {count:6d} ×  {call}" for call, count in self.replaced.most_common()]
        lines += [
            f"  {count:6d} ×  left to PyTorch: {call}: {reason}" for (call, reason), count in self.left.most_common()
        ]
        return "\n".join(lines)

    __str__ = report


def replace_sdpa() -> Replacement:
    """Runs unmodified models on Fovea: `with replace_sdpa() as report: model(x)`, or as a decorator of a function.

    While it is active, torch.nn.functional.scaled_dot_product_attention is Fovea's, also where modules have imported it
    by name. Calls that Fovea refuses (fp64, a device that is neither CPU nor CUDA, ...) go to PyTorch, and so do those
    under torch.nn.attention.sdpa_kernel(SDPBackend.MATH); nothing else does. print() it afterwards: what was replaced,
    what was left, with reasons. Models that torch.compile has compiled before keep what they were compiled with.
    """
    return Replacement()


def _patch() -> None:
    """Wherever a loaded module has the original under any name; and torch.nn's layers ask for it in evaluation too."""
    global _fast_path
    _fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for module in list(sys.modules.values()):
        if module is None or (getattr(module, "__name__", "") or "").startswith(("fovea", "torch._C")):
            continue
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is _original:
                setattr(module, name, _dispatch)
                _patched.append((module, name))


def _restore() -> None:
    torch.backends.mha.set_fastpath_enabled(_fast_path)
    for module, name in _patched:
        setattr(module, name, _original)
    _patched.clear()


def _dispatch(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Fovea's where it takes the call, else PyTorch's."""
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    reason = _why_not(query, key, value, attn_mask, is_causal)
    if reason is None:
        try:
            out = scaled_dot_product_attention(*arguments, scale=scale, enable_gqa=enable_gqa)
        except ValueError as error:
            reason = str(error)
        else:
            _count(arguments, None)
            return out
    _count(arguments, reason)
    return _original(*arguments, scale=scale, enable_gqa=enable_gqa)


def _why_not(query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool) -> str | None:
    """What makes a call PyTorch's before Fovea is asked; a graph that is traced cannot ask."""
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return "not all of query, key, value and attn_mask are tensors"
    if not torch.compiler.is_compiling() and _adapter.in_transform(*tensors):
        return "a transform of torch.func or a forward-mode derivative, of which Fovea has none"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"query is {query.dtype}, and Fovea takes float32, float16 and bfloat16"
    if query.device.type not in ("cpu", "cuda"):
        return f"query is on {query.device}, and Fovea runs on CPUs and NVIDIA GPUs"
    if attn_mask is not None and is_causal:
        return "attn_mask stands beside is_causal, which some of PyTorch's kernels take"
    if any(tensor.is_nested and tensor.layout != torch.jagged for tensor in tensors):
        return "a nested tensor is of strided layout, and Fovea takes jagged ones"
    if _formula_alone():
        return "sdpa_kernel allows PyTorch's formula alone"
    return None


@torch.compiler.assume_constant_result
def _formula_alone() -> bool:
    """Whether sdpa_kernel(SDPBackend.MATH) is active, which is for CPUs too."""
    cuda = torch.backends.cuda
    return not (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled())


def _count(arguments: tuple[Any, ...], reason: str | None) -> None:
    if torch.compiler.is_compiling():
        return
    query, key, _, attn_mask, dropout_p, is_causal = arguments
    if not isinstance(query, torch.Tensor):
        call = f"query of type {type(query).__name__}"
    else:
        call = f"{str(query.dtype).removeprefix('torch.')} on {query.device}, query {_shape(query)}, key {_shape(key)}"
    if isinstance(attn_mask, torch.Tensor):
        call += f", {str(attn_mask.dtype).removeprefix('torch.')} mask {_shape(attn_mask)}"
    call += (", causal" if is_causal else "") + (f", dropout {dropout_p:g}" if dropout_p else "")
    with _lock:
        for replacement in set(_active):  # a decorated function may run inside itself, or in several threads
            if reason is None:
                replacement.replaced[call] += 1
            else:
                replacement.left[call, reason] += 1


def _shape(tensor: Any) -> str:
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    if tensor.is_nested and tensor.layout != torch.jagged:  # which has no shape
        return f"nested, of {tensor.dim()} dimensions"
    return "×".join(str(extent) for extent in tensor.shape) or "of no dimensions"
