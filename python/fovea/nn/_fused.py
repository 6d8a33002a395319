"""Projections and attention of a layer as one node of autograd, without a dispatch for each view between them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from fovea import _core
from fovea.torch import _adapter, _seeds

if TYPE_CHECKING:
    from fovea.nn._attention import MultiheadAttention
    from fovea.nn._packing import Packing


def why_composed(
    layer: MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    need_weights: bool,
) -> str:
    """Why a call is composed of operators, each with a node of autograd; "" where it is one node."""
    if torch.compiler.is_compiling():
        return "it is compiled"
    if need_weights:
        return "weights are wanted"
    if key is not value:
        return "key and value are two tensors"
    if layer.drops_all():
        return "dropout leaves nothing"
    if layer.bias_k is not None:
        return "add_bias_kv adds a key"
    in_weight, out_proj = layer.in_proj_weight, layer.out_proj
    if in_weight is None:
        return "key or value have another size than query"
    if (mask is not None and mask.requires_grad) or (padding is not None and padding.requires_grad):
        return "a mask wants its gradient"
    if type(out_proj) is not NonDynamicallyQuantizableLinear or "forward" in out_proj.__dict__:
        return "out_proj has another forward"
    if (
        out_proj._forward_hooks
        or out_proj._forward_pre_hooks
        or out_proj._backward_hooks
        or out_proj._backward_pre_hooks
        or _has_any_global_hook()
    ):
        return "there are hooks on out_proj"
    if _adapter.special(query, key, in_weight) or _adapter.special(query, key, out_proj.weight):
        return "a dispatch mode, a transform or a class of tensors has to see the operators"
    return ""


def why_torch_multiplies(query: Tensor) -> str:
    """Why the one node is made of PyTorch's products; "" where one call of the compiled half makes them as well."""
    dtype = _adapter.dtype_under_autocast(query)
    if not query.is_cuda:
        return f"the tensors are on {query.device}, not on a GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the tensors are {str(dtype).removeprefix('torch.')}, not float16 or bfloat16"
    return _core.why_no_layer(query.get_device())


def attention(
    layer: MultiheadAttention,
    query: Tensor,
    key: Tensor,
    batch_first: bool,
    others: tuple[Any, ...] | None,
    call_rules: _core.Rules,
    dropout_p: float,
    packing: Packing | None,
) -> Tensor:
    """What the layer makes of query and of key, which is value as well: like query.

    Args:
        query: [batch, seqlen, features], [seqlen, batch, features] where not batch_first, or packed [total, features].
        key: likewise; query itself for self-attention.
        others: the arrays of the call besides q, k and v.
        packing: query, then [batch, seqlen, features] and the key as well, is to be packed so.
    """
    out_proj = layer.out_proj
    tensors: tuple[Tensor | None, ...] = (
        query,
        None if key is query else key,
        layer.in_proj_weight,
        layer.in_proj_bias,
        out_proj.weight,
        out_proj.bias,
    )
    if _adapter.autocasts(query):
        dtype = torch.get_autocast_dtype(query.device.type)
        tensors = tuple(None if x is None else _adapter.as_autocast(x, dtype) for x in tensors)
        others = _adapter.cast_bias(others, dtype)
    if not dropout_p:
        return _Attention.apply((layer.num_heads, batch_first, others, call_rules, (None, 0), packing), *tensors)[0]
    with _seeds.taken_back(query.device):  # what is refused shows only when the projections have been made
        draws = _seeds.draw(query.device)
        return _Attention.apply((layer.num_heads, batch_first, others, call_rules, draws, packing), *tensors)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[Any, ...],
        query: Tensor,
        key: Tensor | None,
        in_weight: Tensor,
        in_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        heads, batch_first, others, call_rules, draws, packing = call
        rest = (heads, batch_first, others, call_rules, *draws)
        made = None
        if query.is_cuda:
            index = None if packing is None else packing.index
            given = (query.contiguous(), None if key is None else key.contiguous())
            made = _core.forward_layer(*given, in_weight, in_bias, out_weight, out_bias, *rest, index)
            key = given[1]
        if made is None:
            made = _forward(query, key, in_weight, in_bias, out_weight, out_bias, rest, packing)
        y, query, q, kv, out, lse = made
        ctx.call = (heads, batch_first, call_rules, draws, packing)
        arrays = ()
        if others is not None:
            *arrays, ctx.max_seqlen_q, ctx.max_seqlen_kv = others
        if not (ctx.needs_input_grad[3] or ctx.needs_input_grad[4]):
            query = key = None
        y = y.detach()  # no view, over which callers could not write
        place = y.new_empty(0)  # in the graph, that of y, which need not be kept for it
        ctx.save_for_backward(place, query, key, in_weight, out_weight, q, kv, out, lse, *arrays)
        return y, place

    @staticmethod
    @_adapter.once
    def backward(ctx: Any, tensors: tuple[Tensor, ...], dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved, arrays = tensors[1:9], tensors[9:]
        heads, batch_first, call_rules, draws, packing = ctx.call
        others = (*arrays, ctx.max_seqlen_q, ctx.max_seqlen_kv) if arrays else None
        rest = (heads, batch_first, others, call_rules, *draws)
        needed = ctx.needs_input_grad
        gradients = None
        if dy.is_cuda:
            index = None if packing is None else packing.index
            wanted = sum(1 << i for i, need in enumerate(needed[1:]) if need)
            gradients = _core.backward_layer(dy.resolve_neg().contiguous(), *saved, *rest, index, wanted)
        if gradients is None:
            # Where backward is called under autocast, products would have another dtype than those of forward.
            kept = torch.autocast(dy.device.type, enabled=False) if _adapter.autocasts(dy) else nullcontext()
            with kept:
                gradients = _backward(dy, *saved, rest, packing, needed[1:])
        return (None, *(gradient if need else None for gradient, need in zip(gradients, needed[1:])))


def _forward(
    query: Tensor,
    key: Tensor | None,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    rest: tuple[Any, ...],
    packing: Packing | None,
) -> tuple[Tensor | None, ...]:
    """_core.forward_layer by PyTorch's products."""
    if packing is not None:
        query = packing.rows(query)
    if key is None:
        q, kv = F.linear(query, in_weight, in_bias), None
    else:
        size = len(out_weight)
        q = F.linear(query, in_weight[:size], None if in_bias is None else in_bias[:size])
        kv = F.linear(key, in_weight[size:], None if in_bias is None else in_bias[size:])
    out, lse = _core.forward_projected(q, kv, *rest)
    y = F.linear(out, out_weight, out_bias)
    return y if packing is None else packing.pad(y), query, q, kv, out, lse


def _backward(
    dy: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    in_weight: Tensor,
    out_weight: Tensor,
    q: Tensor,
    kv: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rest: tuple[Any, ...],
    packing: Packing | None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """_core.backward_layer by PyTorch's products."""
    of_query, of_key, of_in_weight, of_in_bias, of_out_weight, of_out_bias = needed
    dquery = dkey = din_weight = din_bias = None
    size = len(out_weight)
    dy = dy.reshape(-1, size) if packing is None else packing.rows(dy)
    if of_query or of_key or of_in_weight or of_in_bias:
        projected = _core.backward_projected(dy.mm(out_weight).view(out.shape), q, kv, out, lse, *rest)
        dq, dkv = (None if dx is None else dx.view(-1, dx.shape[-1]) for dx in projected)
        if of_in_weight:
            din_weight = dq.t().mm(query.reshape(-1, size))
        if of_in_bias:
            din_bias = dq.sum(0)
        if of_query:
            dquery = dq.mm(in_weight[: dq.shape[1]])
            dquery = dquery.view(*q.shape[:-1], size) if packing is None else packing.pad(dquery)
        if kv is not None:
            if of_in_weight:
                din_weight = torch.cat([din_weight, dkv.t().mm(key.reshape(-1, size))])
            if of_in_bias:
                din_bias = torch.cat([din_bias, dkv.sum(0)])
            if of_key:
                dkey = dkv.mm(in_weight[size:]).view(*kv.shape[:-1], size)
    dout_weight = dy.t().mm(out.view(-1, size)) if of_out_weight else None
    dout_bias = dy.sum(0) if of_out_bias else None
    return dquery, dkey, din_weight, din_bias, dout_weight, dout_bias
