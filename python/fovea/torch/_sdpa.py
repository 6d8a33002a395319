"""torch.nn.functional.scaled_dot_product_attention, with its signature and meaning, on Fovea."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from fovea import _core
from fovea._arguments import rules
from fovea.torch import _adapter, _nested
from fovea.torch._ops import in_rows

#: What the library's sentences call the arguments.
_NAMES = {"q": "query", "k": "key", "v": "value", "mask": "attn_mask", "bias": "attn_mask", "softmax_scale": "scale"}
_NAME = re.compile(rf"\b({'|'.join(_NAMES)})\b")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch.nn.functional.scaled_dot_product_attention computes, without the L×S matrix whatever the options.

    Args:
        query: [..., num_q_heads, L, E], fp32, fp16 or bf16, any leading dimensions; or a jagged nested tensor.
        key: [..., num_kv_heads, S, E]; dimensions of size 1 are broadcast.
        value: [..., num_kv_heads, S, Ev].
        attn_mask: broadcasts to [..., num_q_heads, L, S]: bool, True takes part; or floating, added to the scores, with
            its gradient; or one of torch.nn.attention.bias.
        dropout_p: always applied, as in PyTorch; drawn from the default generator of the query's device.
        is_causal: lower triangle from the top left corner.
        scale: default 1 / sqrt(E).
        enable_gqa: num_q_heads may be a multiple of num_kv_heads.

    Returns:
        [..., num_q_heads, L, Ev] in the query's dtype. A row that sees no key gives 0.

    Raises:
        ValueError: shapes or dtypes that Fovea does not take, in one sentence; fp64 among them.
        TypeError: an is_causal that is neither True nor False, as in PyTorch.
        RuntimeError: an attn_mask together with is_causal, as in PyTorch.
    """
    try:
        if is_causal is not False:
            is_causal = _adapter.flag("is_causal", is_causal)
        corner = "top_left" if is_causal else None
        if dropout_p == 1.0:  # every weight is dropped, as in PyTorch
            value, dropout_p = value * 0, 0.0
        if attn_mask is None and _adapter.plainly_eager(query, key, value):
            call_rules = rules(scale, corner, None, None, 0.0, dropout_p, False, "bhsd", None, False)
            if dropout_p or query.requires_grad or key.requires_grad or value.requires_grad:
                if _core.regular(query, key, value):
                    return _adapter.run(query, key, value, None, call_rules, dropout_p)
            elif (out := _core.forward_regular(query, key, value, call_rules)) is not None:
                return out
        _adapter.only_tensors(query=query, key=key, value=value)
        if attn_mask is not None:
            _adapter.only_tensors(attn_mask=attn_mask)
            if is_causal:
                raise RuntimeError("Explicit attn_mask should not be set when is_causal=True; give one of the two")
            if type(attn_mask) is CausalBias:
                corner = _corner(attn_mask, query.size(-2), key.size(-2))
                attn_mask = None
            else:
                attn_mask = _with_rank(attn_mask, 1)
        nested = query.is_nested or key.is_nested or value.is_nested
        if nested and not enable_gqa:
            _refuse_groups(_nested.heads(query), _nested.heads(key))
        if nested or (query.dim() == key.dim() == value.dim() == 4 and _regular(query, key, value, enable_gqa)):
            return _attend(query, key, value, attn_mask, dropout_p, corner, scale)
        return _irregular(query, key, value, attn_mask, dropout_p, corner, scale, enable_gqa)
    except ValueError as error:
        raise ValueError(_NAME.sub(lambda name: _NAMES[name[0]], str(error))) from None


def _corner(mask: CausalBias, length: int, kv_length: int) -> str:
    """Where the triangle of one of torch.nn.attention.bias starts."""
    if mask.variant == CausalVariant.UPPER_LEFT or mask.seq_len_q == mask.seq_len_kv:
        return "top_left"
    if (mask.seq_len_q, mask.seq_len_kv) != (length, kv_length):
        raise ValueError(
            f"attn_mask is causal_lower_right({mask.seq_len_q}, {mask.seq_len_kv}), but query and key have {length} and"
            f" {kv_length} rows; make it of their lengths"
        )
    return "bottom_right"


def _regular(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether 4-d tensors can be taken as they are."""
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    return (
        batch == key.shape[0] == value.shape[0]
        and kv_heads == value.shape[1]
        and (heads == kv_heads or kv_heads == 1 or enable_gqa)
        and batch * heads * dim * value.shape[3] > 0
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    corner: str | None,
    scale: float | None,
) -> Tensor:
    if not (query.is_nested or key.is_nested or value.is_nested):
        query, key, value = in_rows(query), in_rows(key), in_rows(value)
    mask = bias = None
    if attn_mask is not None:
        _adapter.check_mask("attn_mask", attn_mask, query)
        if attn_mask.stride(-1) not in (0, 1):
            if not attn_mask.requires_grad:  # a gradient has all the places that the mask was expanded to
                attn_mask = _narrowed(attn_mask, (*query.shape[:-1], key.shape[-2]))
            attn_mask = in_rows(attn_mask)
        if attn_mask.dtype == torch.bool:
            mask = attn_mask
        else:
            bias = attn_mask
    return _adapter.attention(
        query,
        key,
        value,
        softmax_scale=scale,
        causal=corner,
        mask=mask,
        bias=bias,
        dropout_p=dropout_p,
        layout="bhsd",
    )


def _narrowed(mask: Tensor, scores: tuple[int, ...]) -> Tensor:
    """The mask with size 1 where it was expanded to the scores' shape, so that a copy of it repeats nothing."""
    for dim in range(-min(mask.dim(), len(scores)), 0):
        if mask.stride(dim) == 0 and mask.shape[dim] == scores[dim]:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _irregular(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    corner: str | None,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Other ranks, broadcasting and empty dimensions, brought to [batch, heads, seqlen, dim]."""
    if min(query.dim(), key.dim(), value.dim()) < 2:
        ranks = f"{query.dim()}, {key.dim()} and {value.dim()}"
        raise ValueError(f"query, key and value need two dimensions or more, but have {ranks}")
    rank = max(query.dim(), key.dim(), value.dim())
    query, key, value = (_with_rank(tensor, max(rank, 4)) for tensor in (query, key, value))
    leads = [tensor.shape[:-3] for tensor in (query, key, value)]
    try:
        lead = torch.broadcast_shapes(*leads)
    except RuntimeError:
        of_query, of_key, of_value = map(list, leads)
        raise ValueError(
            f"the leading dimensions {of_query} of query, {of_key} of key and {of_value} of value do not broadcast;"
            " they must agree, or be 1"
        ) from None
    heads, key_heads, value_heads = query.shape[-3], key.shape[-3], value.shape[-3]
    if key_heads != value_heads and 1 not in (key_heads, value_heads):
        raise ValueError(f"key has {key_heads} heads but value {value_heads}; they must agree, or one of them have 1")
    kv_heads = max(key_heads, value_heads)
    if heads == 1 and kv_heads > 1 and not enable_gqa:
        heads = kv_heads
    if not enable_gqa:
        _refuse_groups(heads, kv_heads)
    length, dim, dim_v, batch = query.shape[-2], query.shape[-1], value.shape[-1], math.prod(lead)
    if batch * heads * kv_heads * dim_v == 0:  # nothing to compute, but a place in the graph
        out = query.new_zeros((*lead, heads, length, dim_v)) + 0 * (query.sum() + key.sum() + value.sum())
        return out.reshape(out.shape[out.dim() - rank :])
    if dim == 0:  # every score is 0
        query, key, scale = torch.nn.functional.pad(query, (0, 1)), torch.nn.functional.pad(key, (0, 1)), 1.0

    def flat(tensor: Tensor, heads: int) -> Tensor:
        return tensor.expand(*lead, heads, -1, -1).reshape(batch, heads, *tensor.shape[-2:])

    query, key, value = flat(query, heads), flat(key, kv_heads), flat(value, kv_heads)
    if attn_mask is not None:
        attn_mask = _with_rank(attn_mask, max(rank, 4))
        if len(lead) > 1:
            mask_lead = attn_mask.shape[:-3]
            if len(mask_lead) > len(lead) or any(m not in (1, n) for m, n in zip(mask_lead, lead)):
                shape = [*lead, heads, length, key.shape[-2]]
                raise ValueError(f"attn_mask has the shape {list(attn_mask.shape)} but must broadcast to {shape}")
            if math.prod(mask_lead) > 1:
                attn_mask = flat(attn_mask, attn_mask.shape[-3])
            else:
                attn_mask = attn_mask.reshape(1, *attn_mask.shape[-3:])
    out = _attend(query, key, value, attn_mask, dropout_p, corner, scale)
    return out.reshape((*lead, heads, length, dim_v)[max(rank, 4) - rank :])


def _refuse_groups(heads: int | None, kv_heads: int | None) -> None:
    """Refuses heads that only enable_gqa lets share keys and values; None is not known."""
    if None not in (heads, kv_heads) and kv_heads not in (1, heads):
        raise ValueError(
            f"the query has {heads} heads and key and value {kv_heads}; give enable_gqa=True if groups of query heads"
            " share theirs"
        )


def _with_rank(tensor: Tensor, rank: int) -> Tensor:
    """With leading ones."""
    missing = rank - tensor.dim()
    return tensor[(None,) * missing] if missing > 0 else tensor
