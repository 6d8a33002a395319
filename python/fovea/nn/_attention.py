"""torch.nn.MultiheadAttention on fovea.attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fovea._arguments import extras, rules
from fovea.nn import _explain, _fused, _masks
from fovea.nn._packing import Packing, Rows, can_pack
from fovea.torch import _adapter
from fovea.torch._nested import check_lengths

_LARGEST_HEAD_DIM = 512


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: its constructor, its call, its state_dict; never the N×N matrix but on request.

    Masks, padding, dropout and training run in tiles like everything else. need_weights=True, torch's default, computes
    the weights besides, by tiles. Nested tensors are taken in training too. A row that sees no key gives the bias of
    out_proj, where torch gives NaN.

    Attributes:
        pack_padding: leave the tokens that a boolean key_padding_mask hides out of self-attention altogether. Their
            rows of the output are 0 then, where torch computes what nobody should read.
    """

    pack_padding = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """torch.nn.MultiheadAttention's."""
        self._check(query, key, value, attn_mask, key_padding_mask, is_causal)
        if query.is_nested:
            if key_padding_mask is not None or (attn_mask is not None and not is_causal) or need_weights:
                raise ValueError(
                    "nested tensors take need_weights=False, no key_padding_mask, attn_mask only with is_causal=True"
                )
            return self._nested(query, key, value, is_causal), None
        if query.dim() == 2:
            batched = [x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value)]
            if key is query:
                batched[1] = batched[0]
            if value is key:
                batched[2] = batched[1]
            if key_padding_mask is not None:
                key_padding_mask = _masks.of_one(key_padding_mask, len(key))
            out, weights = self.forward(
                *batched, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return out.squeeze(0 if self.batch_first else 1), None if weights is None else weights.squeeze(0)
        if query.shape[0 if self.batch_first else 1] == 0:  # PyTorch's empty result; there is nothing to mask
            return super().forward(query, key, value, None, need_weights, None, average_attn_weights)
        if self._packs(query, key, value, key_padding_mask, attn_mask, need_weights, is_causal):
            packing = Packing(key_padding_mask)
            x = query if self.batch_first else query.transpose(0, 1)
            out = self._of_rows([x, x, x], packing, packing, is_causal)
            return out if self.batch_first else out.transpose(0, 1), None

        axis = 1 if self.batch_first else 0
        lengths = (query.shape[axis], key.shape[axis])
        options = _masks.options_of(
            attn_mask,
            key_padding_mask,
            is_causal,
            query,
            query.shape[1 - axis],
            self.num_heads,
            *lengths,
            int(self.bias_k is not None),
        )
        if not _fused.why_composed(self, query, key, value, attn_mask, key_padding_mask, need_weights):
            return self._at_once(query, key, self.batch_first, options), None
        q, k, v = self._project(query, key, value)
        if not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        if self.bias_k is not None:
            more = (len(k), 1, self.num_heads, self.head_dim)
            k = torch.cat([k, self.bias_k.view(more[1:]).expand(more)], 1)
            v = torch.cat([v, self.bias_v.view(more[1:]).expand(more)], 1)
        options |= self._options(q)
        if need_weights and options["dropout_p"]:
            options["seed"] = _adapter.drawn(q, k, v, options)
        out, lse = self._attend(q, k, v, return_lse=True, **options)
        out = out.flatten(2)
        out = self.out_proj(out if self.batch_first else out.transpose(0, 1))  # contiguous, as torch.nn's
        return out, self._weights(q, k, lse, options, average_attn_weights) if need_weights else None

    def explain(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        is_causal: bool = False,
    ) -> _explain.LayerReport:
        """Who would run a call, and what torch.nn's layer would have done with it; nothing is computed.

        Args:
            query: as forward takes it, but neither nested nor of an empty batch; key and value are the same where they
                are not given.
            mask: forward's attn_mask.
        """
        key = query if key is None else key
        value = key if value is None else value
        return _explain.of_attention(self, query, key, value, mask, key_padding_mask, need_weights, is_causal)

    def _nested(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        """Of nested tensors, whatever batch_first."""
        if self.bias_k is not None:
            raise ValueError("nested tensors cannot take the key that add_bias_kv adds; pad the batch")
        of_query = Rows(query)
        of_key = of_query if key is query else Rows(key)
        of_value = of_key if value is key else Rows(value)
        check_lengths("key", of_key.offsets, "value", of_value.offsets)
        return of_query.nested(self._of_rows([of_query.rows, of_key.rows, of_value.rows], of_query, of_key, is_causal))

    def _of_rows(
        self, inputs: list[Tensor], of_query: Rows | Packing, of_key: Rows | Packing, is_causal: bool
    ) -> Tensor:
        """Of query, key and value as [rows, features], one sequence behind the other, or as a Packing will lay them."""
        packing = of_query if isinstance(of_query, Packing) else None
        options = {
            "causal": "top_left" if is_causal else None,
            "cu_seqlens_q": of_query.cu_seqlens,
            "cu_seqlens_kv": of_key.cu_seqlens,
            "max_seqlen_q": of_query.longest,
            "max_seqlen_kv": of_key.longest,
        }
        if not _fused.why_composed(self, *inputs, None, None, False):
            return self._at_once(inputs[0], inputs[1], True, options, packing)
        if packing is not None:
            inputs = [packing.rows(inputs[0])] * 3
        q, k, v = self._project(*inputs)
        out = self.out_proj(self._attend(q, k, v, **options, **self._options(q)).flatten(1))
        return out if packing is None else packing.pad(out)

    def _at_once(
        self,
        query: Tensor,
        key: Tensor,
        batch_first: bool,
        options: dict[str, Any],
        packing: Packing | None = None,
    ) -> Tensor:
        """All of the layer as one node of autograd."""
        options |= self._options(query)
        others = extras(
            options.get("mask"),
            options.get("bias"),
            None,
            options["sink"],
            None,
            options.get("kv_lengths"),
            options.get("cu_seqlens_q"),
            options.get("cu_seqlens_kv"),
            options.get("max_seqlen_q"),
            options.get("max_seqlen_kv"),
        )
        dropout_p = options["dropout_p"]
        call_rules = rules(None, options.get("causal"), None, None, 0.0, dropout_p, False, "bshd", None, False)
        return _fused.attention(self, query, key, batch_first, others, call_rules, dropout_p, packing)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k and v with heads apart, by as few products as the inputs allow."""
        bias, size = self.in_proj_bias, self.embed_dim

        def heads(x: Tensor, weight: Tensor, first: int, count: int) -> Any:
            part = None if bias is None else bias[first * size : (first + count) * size]
            return F.linear(x, weight, part).unflatten(-1, (count, self.num_heads, self.head_dim)).unbind(-3)

        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            return [heads(x, w, i, 1)[0] for i, (x, w) in enumerate(zip((query, key, value), weights))]
        weight = self.in_proj_weight
        if key is value:
            if query is key:
                return list(heads(query, weight, 0, 3))
            return [*heads(query, weight[:size], 0, 1), *heads(key, weight[size:], 1, 2)]
        parts = weight.unflatten(0, (3, size))
        return [heads(x, parts[i], i, 1)[0] for i, x in enumerate((query, key, value))]

    def drops_all(self) -> bool:
        """Whether dropout leaves nothing of attention, as torch.nn's may; attention itself keeps some weights."""
        return self.training and self.dropout == 1.0

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return _adapter.attention(q, k, v * 0 if self.drops_all() else v, **options)

    def _options(self, q: Tensor) -> dict[str, Any]:
        """What is the same for all calls of attention."""
        # A key of score 0 without a value is a sink.
        sink = torch.zeros(self.num_heads, dtype=torch.float32, device=q.device) if self.add_zero_attn else None
        return {"dropout_p": self.dropout if self.training and not self.drops_all() else 0.0, "sink": sink}

    def _weights(self, q: Tensor, k: Tensor, lse: Tensor, options: dict[str, Any], average: bool) -> Tensor:
        """The weights, by tiles of keys: with columns of the unit matrix as values, out is the weights."""
        batch, keys = k.shape[:2]
        shape = (batch, q.shape[1]) if average else (batch, self.num_heads, q.shape[1])
        tiles = [q.new_empty((*shape, 0))]
        for first in range(0, keys, _LARGEST_HEAD_DIM):
            count = min(_LARGEST_HEAD_DIM, keys - first)
            unit = torch.eye(count, dtype=q.dtype, device=q.device)
            values = F.pad(unit, (0, 0, first, keys - first - count))
            values = values[None, :, None].expand(batch, -1, self.num_heads, -1)
            tile = self._attend(q, k, values, **options)
            tiles.append(tile.mean(2) if average else tile.transpose(1, 2))
        if self.add_zero_attn:
            zero = torch.exp(-lse).masked_fill(lse == -torch.inf, 1.0).to(q.dtype)  # all that a row without keys has
            tiles.append((zero.mean(1) if average else zero).unsqueeze(-1))
        return torch.cat(tiles, -1)

    def _packs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        need_weights: bool,
        is_causal: bool,
    ) -> bool:
        """Whether padding is left out."""
        return (
            self.pack_padding
            and key_padding_mask is not None
            and query is key is value
            and can_pack(key_padding_mask, attn_mask, query, self)
            and (attn_mask is None or is_causal)
            and not need_weights
            and self.bias_k is None
        )

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        _adapter.only_tensors(query=query, key=key, value=value)
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if mask is not None:
                _adapter.only_tensors(**{name: mask})
        if is_causal and attn_mask is None and not query.is_nested:
            raise RuntimeError("is_causal is a hint that attn_mask is the causal triangle; give attn_mask, too")
        if query is key is value and query.dim() in (2, 3) and query.size(-1) == self.kdim == self.vdim:
            return  # one tensor agrees with itself
        for name, x, size in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.is_nested != query.is_nested:
                raise ValueError(f"query and {name} must both be nested tensors, or neither")
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise ValueError(f"{name} has {x.dim()} dimensions; query, key and value must all have 3, or all 2")
            if x.size(-1) != size:  # strided nested tensors have no shape
                raise ValueError(f"{name} has {x.size(-1)} features but the layer takes {size}")
        if not key.is_nested and key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"key is {list(key.shape)} but value {list(value.shape)}; their lengths must agree")
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and query.size(batch) != key.size(batch):
            raise ValueError(f"query has {query.size(batch)} sequences but key has {key.size(batch)}; they must agree")
