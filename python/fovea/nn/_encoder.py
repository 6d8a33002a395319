"""torch.nn's encoder layers with Fovea's attention."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fovea.nn import _explain, _masks
from fovea.nn._attention import MultiheadAttention
from fovea.nn._packing import Packing, Rows, can_pack
from fovea.torch._adapter import tracing


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: its constructor, its call, its state_dict, with Fovea's attention.

    Attributes:
        pack_padding: compute nothing for the tokens that a boolean src_key_padding_mask hides. Their rows of the output
            are 0 then, where torch computes what nobody should read.
    """

    pack_padding = False

    if not TYPE_CHECKING:  # to those who check types the constructor is torch.nn's

        @functools.wraps(torch.nn.TransformerEncoderLayer.__init__)
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.self_attn.__class__ = MultiheadAttention  # the same parameters, another forward

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """torch.nn.TransformerEncoderLayer's."""
        if self.pack_padding and _packs([self], src, src_mask, src_key_padding_mask, is_causal):
            batch_first = self.self_attn.batch_first
            packing = Packing(src_key_padding_mask)
            packed = packing.pack(src if batch_first else src.transpose(0, 1))
            out = packing.pad(self._layer(packed, None, None, is_causal).values())
            return out if batch_first else out.transpose(0, 1)
        return self._layer(src, src_mask, src_key_padding_mask, is_causal)

    def explain(
        self,
        src: Tensor,
        *,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> _explain.LayerReport:
        """Who would run the layer's attention, and what torch.nn's layer would have done; nothing is computed.

        Args:
            src: as forward takes it, but neither nested nor of an empty batch.
            mask: forward's src_mask.
        """
        packed = self.pack_padding and _packs([self], src, mask, src_key_padding_mask, is_causal)
        return _explain.of_layer(self, src, mask, src_key_padding_mask, is_causal, packed)

    def _layer(self, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor:
        """Both halves, for what stands in rows; attention alone needs to know which rows are of one sequence."""
        x, nested = src, None
        if src.is_nested:
            packed = Rows(src)
            x, nested = packed.rows, packed.nested

        def attend(y: Tensor) -> Tensor:
            if nested is None:
                return self._sa_block(y, mask, padding, is_causal)
            y = nested(y)
            return self.dropout1(Rows(self.self_attn(y, y, y, padding, False, mask, is_causal=is_causal)[0]).rows)

        if self.norm_first:
            x = x + attend(self.norm1(x))
            x = x + self._ff_block(self.norm2(x))
        else:
            x = self.norm1(x + attend(x))
            x = self.norm2(x + self._ff_block(x))
        return x if nested is None else nested(x)


class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch.nn.TransformerEncoder: its constructor, its call, its state_dict, over Fovea's layers.

    In evaluation it leaves boolean padding out wherever torch.nn's does (enable_nested_tensor).

    Attributes:
        pack_padding: leave padding out in every call with a boolean src_key_padding_mask, training included. The rows
            of padding come out as if the layers gave 0.
    """

    pack_padding = False

    if not TYPE_CHECKING:  # to those who check types the constructor is torch.nn's

        @functools.wraps(torch.nn.TransformerEncoder.__init__)
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            for layer in self.layers:
                if type(layer) is torch.nn.TransformerEncoderLayer:
                    layer.__class__ = TransformerEncoderLayer
                    layer.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """torch.nn.TransformerEncoder's."""
        if is_causal is None:
            is_causal = _masks.is_triangle(mask)
        packing = self._packing(src, mask, src_key_padding_mask, is_causal)
        if packing is None:
            out = src
            for layer in self.layers:
                out = layer(out, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        else:
            batch_first = self.layers[0].self_attn.batch_first
            out = packing.pack(src if batch_first else src.transpose(0, 1))
            for layer in self.layers:
                out = layer(out, is_causal=is_causal)
            out = packing.pad(out.values())
            if not batch_first:
                out = out.transpose(0, 1)
        return out if self.norm is None else self.norm(out)

    def explain(
        self,
        src: Tensor,
        *,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> _explain.LayerReport:
        """As TransformerEncoderLayer.explain, for the first layer."""
        if is_causal is None:
            is_causal = _masks.is_triangle(mask)
        packing = self._packing(src, mask, src_key_padding_mask, is_causal)
        return _explain.of_layer(self.layers[0], src, mask, src_key_padding_mask, is_causal, packing is not None)

    def _packing(self, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Packing | None:
        """How padding is left out, where it is."""
        if not _packs(self.layers, src, mask, padding, is_causal):
            return None
        if self.pack_padding:
            return Packing(padding)
        # Where torch.nn's does so: nothing to learn, no other mask, and padding only at the ends.
        learns = torch.is_grad_enabled() and (
            src.requires_grad or any(p.requires_grad for p in self.layers[0].parameters())
        )
        if not self.use_nested_tensor or self.training or learns or mask is not None or torch.is_autocast_enabled():
            return None
        if torch.compiler.is_compiling() or tracing() or not torch.backends.mha.get_fastpath_enabled():
            return None
        only_tails = _masks.has_values(padding) and bool((padding[:, 1:] >= padding[:, :-1]).all())
        return Packing(padding) if only_tails else None


def _packs(
    layers: Iterable[torch.nn.Module], src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
) -> bool:
    """Whether the padding of a call can be left out, which a layer or an attention of somebody else's may not know."""
    return (
        padding is not None
        and not src.is_nested
        and src.dim() == 3
        and is_causal == (mask is not None)  # causal without a mask is refused where masks are read
        and all(
            isinstance(layer, TransformerEncoderLayer)
            and isinstance(layer.self_attn, MultiheadAttention)
            and can_pack(padding, mask, src, layer.self_attn)
            for layer in layers
        )
    )
