"""What runs in a layer of Fovea's, and what torch.nn's would have done in its place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import fovea
from fovea._core import Report
from fovea.nn import _fused, _masks
from fovea.torch import _adapter

if TYPE_CHECKING:
    from fovea.nn._attention import MultiheadAttention
    from fovea.nn._encoder import TransformerEncoderLayer


@dataclass
class LayerReport:
    """Who runs a call of a layer; print() it.

    Attributes:
        forward: fovea.explain's report of the attention.
        backward: likewise of its gradients, where the call would have some.
        packed: whether padding is left out.
        torch_kernel: what torch.nn's layer would have run: an operator's name, or "math", the N×N formula.
        torch_reason: why it would not have taken its fast path; "" if it would.
        torch_bytes: what its matrix of weights would have taken; 0 if it would have made none.
        composed: why projections and attention are operators with a node of autograd each; "" if they are one node.
        torch_products: why PyTorch makes the projections' products; "" if cuBLASLt does, in one call with attention.
    """

    forward: Report
    backward: Report | None
    packed: bool
    torch_kernel: str
    torch_reason: str
    torch_bytes: int
    composed: str
    torch_products: str

    def __str__(self) -> str:
        reports = [self.forward] if self.backward is None else [self.forward, self.backward]
        lines = [str(report).rstrip() for report in reports]
        if self.composed:
            lines.append(f"projections and attention are no single node of autograd: {self.composed}")
        elif self.torch_products:
            lines.append(f"projections are PyTorch's products: {self.torch_products}")
        if self.packed:
            lines.append("padding is left out: sequences lie one behind the other")
        lines.append(f"torch.nn would have run {self.torch_kernel}")
        if self.torch_bytes:
            lines.append(f"torch.nn would have made {self.torch_bytes / 2**20:.3g} MiB of weights, N×N for every head")
        if self.torch_reason:
            lines.append(f"torch.nn would not have taken its fast path: {self.torch_reason}")
        return "\n".join(lines)


def of_attention(
    layer: MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    need_weights: bool,
    is_causal: bool,
) -> LayerReport:
    """MultiheadAttention.explain."""
    _refuse_nested(query, key, value)
    layer._check(query, key, value, mask, padding, is_causal)
    packed = layer._packs(query, key, value, padding, mask, need_weights, is_causal)
    fast = ("_native_multi_head_attention", why_no_fast_path(layer, query, key, value, mask, padding))
    return _report(layer, query, key, value, mask, padding, need_weights, is_causal, packed, *fast)


def of_layer(
    layer: TransformerEncoderLayer,
    src: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
    packed: bool,
) -> LayerReport:
    """TransformerEncoderLayer.explain; `packed`: it leaves padding out itself, or gets a batch without."""
    _refuse_nested(src)
    attention = getattr(layer, "self_attn", None)
    if not isinstance(attention, fovea.nn.MultiheadAttention):
        raise ValueError(
            f"a {type(layer).__name__} whose attention is a {type(attention).__name__} is not Fovea's to explain;"
            " fovea.nn.convert makes torch.nn's attention Fovea's"
        )
    attention._check(src, src, src, mask, padding, is_causal)
    packed = packed or attention._packs(src, src, src, padding, mask, False, is_causal)
    fast = ("_transformer_encoder_layer_fwd", why_no_fast_layer(layer, src, mask, padding))
    return _report(attention, src, src, src, mask, padding, False, is_causal, packed, *fast)


def _refuse_nested(*inputs: Tensor) -> None:
    if any(isinstance(x, Tensor) and x.is_nested for x in inputs):
        raise ValueError("a layer's explain takes no nested tensors; give the padded batch, or ask fovea.explain")


def _report(
    layer: MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    need_weights: bool,
    is_causal: bool,
    packed: bool,
    fast_kernel: str,
    why_not_fast: str,
) -> LayerReport:
    """torch runs `fast_kernel` where nothing stands against it."""
    if query.dim() == 3 and query.shape[0 if layer.batch_first else 1] == 0:
        raise ValueError(f"the batch is empty ({list(query.shape)}), and nothing runs for it; give a sequence")
    forward, backward = _ours(layer, query, key, mask, padding, is_causal, packed)
    kernel, size = fast_kernel, 0
    if why_not_fast:
        kernel, size = _torch_kernel(layer, query, key, mask, padding, need_weights, is_causal)
    composed = _fused.why_composed(layer, query, key, value, mask, padding, need_weights)
    products = composed or _fused.why_torch_multiplies(query)
    return LayerReport(forward, backward, packed, kernel, why_not_fast, size, composed, products)


def _ours(
    layer: MultiheadAttention,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
    packed: bool,
) -> tuple[Report, Report | None]:
    """Fovea's reports, of tensors that have their shapes alone."""
    q, k = _heads(layer, query), _heads(layer, key, int(layer.bias_k is not None))
    options: dict[str, Any]
    if packed:
        lengths = (~padding).sum(1)
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        q = k = q.new_empty(int(ends[-1]), *q.shape[2:])
        longest = int(lengths.max())
        options = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": longest, "max_seqlen_kv": longest}
        options["causal"] = "top_left" if is_causal else None
    else:
        if padding is not None and query.dim() == 2:
            padding = _masks.of_one(padding, len(key))
        extra = int(layer.bias_k is not None)
        sizes = (q.shape[0], layer.num_heads, q.shape[1], k.shape[1] - extra)
        options = _masks.options_of(mask, padding, is_causal, query, *sizes, extra)
    options |= layer._options(q)
    forward = fovea.explain(q, k, k, **options)
    if not _learns(layer, query):
        return forward, None
    return forward, fovea.explain(q, k, k, backward=True, **options)


def _heads(layer: MultiheadAttention, x: Tensor, more: int = 0) -> Tensor:
    """An empty tensor in the place of a projection of x: [batch, seqlen + more, heads, head_dim]."""
    if x.dim() == 2:
        batch, seqlen = 1, x.shape[0]
    else:
        batch, seqlen = (x.shape[0], x.shape[1]) if layer.batch_first else (x.shape[1], x.shape[0])
    shape = (batch, seqlen + more, layer.num_heads, layer.head_dim)
    return torch.empty(shape, dtype=_adapter.dtype_under_autocast(x), device=x.device)


def _learns(module: torch.nn.Module, x: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


# ---- what torch.nn's layers ask before they take their fast path; tests hold this against what they really run


def why_no_fast_path(
    layer: torch.nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
) -> str:
    """Why torch.nn.MultiheadAttention would not take its fast path; "" if it would."""
    floating = any(m is not None and m.is_floating_point() for m in (mask, padding))
    return _first(
        (not torch.backends.mha.get_fastpath_enabled(), "it is switched off (torch.backends.mha)"),
        (query.dim() != 3, "the input is not batched"),
        (query is not key or key is not value, "query, key and value are not one tensor"),
        (layer.in_proj_weight is None, "key or value have another size than query"),
        (layer.in_proj_bias is None, "the layer has no bias"),
        (layer.training, "the layer is in training mode"),
        (layer.num_heads % 2 == 1, f"the number of heads ({layer.num_heads}) is odd"),
        (not layer.batch_first, "the layer is not batch_first"),
        (layer.bias_k is not None, "add_bias_kv adds a key"),
        (layer.add_zero_attn, "add_zero_attn adds a key"),
        (floating, "a mask is floating point"),
        (torch.is_autocast_enabled(), "autocast is enabled"),
        (_learns(layer, query), "gradients are wanted"),
    )


def why_no_fast_layer(
    layer: torch.nn.TransformerEncoderLayer, src: Tensor, mask: Tensor | None, padding: Tensor | None
) -> str:
    """Why torch.nn.TransformerEncoderLayer would not take its fast path; "" if it would."""
    attention = layer.self_attn
    return _first(
        (not torch.backends.mha.get_fastpath_enabled(), "it is switched off (torch.backends.mha)"),
        (src.dim() != 3, "the input is not batched"),
        (layer.training, "the layer is in training mode"),
        (not attention.batch_first, "the layer is not batch_first"),
        (attention.in_proj_bias is None, "the layer has no bias"),
        (not layer.activation_relu_or_gelu, "the activation is neither relu nor gelu"),
        (layer.norm1.eps != layer.norm2.eps, "the norms differ in eps"),
        (attention.num_heads % 2 == 1, f"the number of heads ({attention.num_heads}) is odd"),
        (torch.is_autocast_enabled(), "autocast is enabled"),
        (any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules()), "there are hooks on the layer"),
        (_learns(layer, src), "gradients are wanted"),
    )


def _first(*obstacles: tuple[bool, str]) -> str:
    return next((reason for stands, reason in obstacles if stands), "")


def _torch_kernel(
    layer: torch.nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    need_weights: bool,
    is_causal: bool,
) -> tuple[str, int]:
    """What runs off the fast path, and the bytes of its N×N weights."""
    more = (layer.bias_k is not None) + layer.add_zero_attn
    q, k = (x.transpose(1, 2) for x in (_heads(layer, query), _heads(layer, key, int(more))))
    shape = (*q.shape[:3], k.shape[2])
    size = math.prod(shape) * q.element_size()
    if need_weights:
        return "math, the N×N formula, because weights are wanted", size
    causal = is_causal and padding is None
    merged = None
    if not causal and (mask is not None or padding is not None):
        merged = q.new_empty(1, 1, 1, shape[3]).expand(shape)
    p = layer.dropout if layer.training else 0.0
    if _learns(layer, query):
        q.requires_grad_()
    choice = SDPBackend(torch._fused_sdp_choice(q, k, k, merged, p, causal))
    if choice == SDPBackend.MATH:
        return "math, the N×N formula", size
    return f"scaled_dot_product_attention's {choice.name.lower()}", 0
