"""fovea.attention for PyTorch's tensors: eagerly on the shortest way, through operators where somebody traces."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fovea import _core
from fovea._arguments import extras, rules
from fovea.torch import _nested, _ops, _seeds

#: Tensors without a dispatch of their own.
_PLAIN = (Tensor, torch.nn.Parameter)
any_autocast = torch._C._is_any_autocast_enabled
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_of_old_vmap = torch._C._functorch.is_legacy_batchedtensor


class _Once(torch.autograd.Function):
    """Gradients, tied to all that they were computed from, so that nobody differentiates them by mistake."""

    @staticmethod
    def forward(ctx: Any, gradients: tuple[Tensor | None, ...], *sources: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if gradient is None else gradient.detach() for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(_ops.ONCE)


def once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A node's backward(ctx, saved, *gradients) whose results refuse to be differentiated again.

    The first saved tensor must be an output of the node: its place in the graph is what all inputs lead to.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        _refuse_transforms(*gradients)
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return backward(ctx, saved, *gradients)
        with torch.no_grad():
            results = backward(ctx, saved, *gradients)
        return _Once.apply(results, saved[0], *gradients)

    return refusing


class _Attention(torch.autograd.Function):
    """Eager autograd; `extra` are bias, alibi_slopes and sink where there are any arrays besides q, k and v."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        others: tuple[Any, ...] | None,
        call_rules: _core.Rules,
        seed: int | None,
        offset: int,
        return_lse: bool,
        *extra: Tensor | None,
    ) -> Any:
        out, lse = _core.forward(q, k, v, others, call_rules, seed, offset, True, None)
        ctx.call = (call_rules, seed, offset)
        if others is None:
            ctx.save_for_backward(out, lse, q, k, v)
        else:
            *arrays, ctx.max_seqlen_q, ctx.max_seqlen_kv = others
            ctx.save_for_backward(out, lse, q, k, v, *arrays)
        if not return_lse:
            return out
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], dout: Tensor | None, dlse: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        if dout is None and dlse is None:
            return (None,) * len(needed)
        out, lse, q, k, v, *arrays = saved
        others = (*arrays, ctx.max_seqlen_q, ctx.max_seqlen_kv) if arrays else None
        dout = torch.zeros_like(out) if dout is None else _ops.in_rows(dout)
        wanted = needed[8] + 2 * needed[9] + 4 * needed[10] if arrays else 0
        gradients = _core.backward(dout, _ops.in_rows(dlse), q, k, v, out, lse, others, *ctx.call, wanted)
        return (*gradients[:3], None, None, None, None, None, *(gradients[3:] if arrays else ()))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: str | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    q_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    deterministic: bool = False,
    layout: str = "bshd",
    return_lse: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
    strict: bool = False,
) -> Any:
    """fovea.attention."""
    packed_again = None
    if not plainly_eager(q, k, v):
        if not is_dynamo_compiling():
            q, k, v = _ordinary(q, k, v)
        if torch.is_autocast_enabled(q.device.type):
            q, k, v, bias = _autocast(q, k, v, bias)
        if q.is_nested:
            if cu_seqlens_q is not None or cu_seqlens_kv is not None or out is not None:
                raise ValueError("nested tensors bring their own cu_seqlens and make their own out; leave both out")
            q, k, v, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, packed_again = _nested.unpack(
                q, k, v, layout
            )
            layout = "bshd"
    if torch.compiler.is_compiling() or _watched(q, k, v):
        if not dropout_p:
            seed_tensor = None
        else:
            seed_tensor = _ops.draw_seed(q) if seed is None else _seeds.to_tensor(seed, offset)
        result, lse = _ops.attention(
            q,
            k,
            v,
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
            seed_tensor,
            softmax_scale,
            causal,
            window_left,
            window_right,
            softcap,
            dropout_p,
            deterministic,
            layout,
            backend,
            strict,
        )
        if out is not None:
            result = out.copy_(result)
        elif packed_again is not None:
            result = packed_again(result)
        return (result, lse) if return_lse else result

    call_rules = rules(
        softmax_scale, causal, window_left, window_right, softcap, dropout_p, deterministic, layout, backend, strict
    )
    others = None
    if not (mask is bias is alibi_slopes is sink is q_lengths is kv_lengths is cu_seqlens_q is cu_seqlens_kv is None):
        others = extras(
            mask,
            bias if bias is None else bias.resolve_neg(),
            alibi_slopes,
            sink,
            q_lengths,
            kv_lengths,
            cu_seqlens_q,
            cu_seqlens_kv,
            max_seqlen_q,
            max_seqlen_kv,
        )
    result = run(q, k, v, others, call_rules, dropout_p, seed, offset, return_lse, out)
    if packed_again is None:
        return result
    return (packed_again(result[0]), result[1]) if return_lse else packed_again(result)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    others: tuple[Any, ...] | None,
    call_rules: _core.Rules,
    dropout_p: float,
    seed: int | None = None,
    offset: int = 0,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Any:
    """An eager call, with autograd where somebody wants gradients."""
    if dropout_p and seed is None:
        seed, offset = _seeds.draw(q.device)
    extra = () if others is None else others[1:4]  # bias, alibi_slopes, sink
    if not torch.is_grad_enabled() or not (
        q.requires_grad or k.requires_grad or v.requires_grad or (extra and _any_needs_grad(extra))
    ):
        return _core.forward(q, k, v, others, call_rules, seed, offset, return_lse, out)
    if out is not None:
        raise ValueError("out cannot be given where gradients are wanted; call under torch.no_grad() or leave it out")
    return _Attention.apply(q, k, v, others, call_rules, seed, offset, return_lse, *extra)


def plainly_eager(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a call needs nothing but its result: no tracing, no autocast, no tensors of a special kind."""
    return not (is_dynamo_compiling() or any_autocast() or special(q, k, v))


def special(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether tensors are of a kind that the compiled half cannot read, or somebody wants to see operators."""
    return _watched(q, k, v) or q.is_neg() or k.is_neg() or v.is_neg()  # a sign by a bit, which DLPack does not tell


def _ordinary(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signs that are only a bit written out; transforms of functorch and what is no tensor refused."""
    for name, tensor in (("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}, but q a PyTorch tensor; give PyTorch tensors")
    _refuse_transforms()
    return q.resolve_neg(), k.resolve_neg(), v.resolve_neg()


def _refuse_transforms(*gradients: Tensor | None) -> None:
    """Transforms of functorch and the vmap of is_grads_batched, which came before them."""
    if _transforms() is not None or any(x is not None and _of_old_vmap(x) for x in gradients):
        raise RuntimeError(
            "fovea.attention does not run under vmap, grad and the other transforms of torch.func; give q, k and v the"
            " batch dimension in place of vmap, and use torch.autograd, one gradient at a time, in place of grad"
        )


def _watched(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a subclass with its own dispatch, a tracing mode or a transform wants to see operators."""
    return (
        type(q) not in _PLAIN
        or type(k) not in _PLAIN
        or type(v) not in _PLAIN
        or _modes() != 0
        or _transforms() is not None
    )


def _any_needs_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _autocast(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Any, Any, Any, Any]:
    """Autocast's dtype for q, k and v; a bias stays in fp32, which costs nothing, or follows q."""
    dtype = torch.get_autocast_dtype(q.device.type)
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.to(dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype), bias
