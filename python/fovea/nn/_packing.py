"""Batches without their padding: rows of all sequences one behind the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fovea import _core
from fovea.nn._masks import shape_of
from fovea.torch._adapter import tracing
from fovea.torch._nested import check_jagged


def can_pack(padding: Tensor, mask: Tensor | None, x: Tensor, layer: torch.nn.MultiheadAttention) -> bool:
    """Whether a key_padding_mask tells of x's tokens, some; what does not fit is refused where masks are read.

    Args:
        mask: the causal triangle, which is not looked at but for its shape.
    """
    batch, seqlen = (x.shape[0], x.shape[1]) if layer.batch_first else (x.shape[1], x.shape[0])
    if mask is not None and shape_of(mask, batch, layer.num_heads, seqlen, seqlen) is None:
        return False
    told = padding.dtype == torch.bool and padding.shape == (batch, seqlen) and padding.device == x.device
    return told and padding.numel() > 0


class Packing:
    """Where the tokens stand that a key_padding_mask [batch, seqlen] does not hide."""

    def __init__(self, key_padding_mask: Tensor) -> None:
        if tracing():
            raise RuntimeError("torch.jit.trace would keep the padding of this batch; trace without pack_padding")
        self.shape = key_padding_mask.shape
        # Waits for a GPU: how many rows there are decides about memory.  In index are cu_seqlens, the place of each row
        # and the row of each place or -1, one behind the other.
        self.index, self.num_rows, self.shortest, self.longest = _core.pack(key_padding_mask.contiguous())
        self.cu_seqlens = self.index[: self.shape[0] + 1]

    @property
    def places(self) -> Tensor:
        """Where each row stands in the flattened batch."""
        first = self.shape[0] + 1
        return self.index[first : first + self.num_rows].long()

    def rows(self, padded: Tensor) -> Tensor:
        """[batch, seqlen, features] as [tokens, features]."""
        return padded.reshape(-1, padded.shape[-1]).index_select(0, self.places)

    def pack(self, padded: Tensor) -> Tensor:
        """[batch, seqlen, features] as a jagged tensor."""
        return torch.nested.nested_tensor_from_jagged(
            self.rows(padded), self.cu_seqlens.long(), min_seqlen=self.shortest, max_seqlen=self.longest
        )

    def pad(self, rows: Tensor) -> Tensor:
        """The reverse of rows: [batch, seqlen, features], 0 in place of padding."""
        padded = rows.new_zeros((self.shape.numel(), rows.shape[1]))
        return padded.index_copy_(0, self.places, rows).view(*self.shape, -1)


class Rows:
    """The rows of a nested tensor [batch, seqlen*, features], jagged or strided."""

    def __init__(self, nested: Tensor) -> None:
        self.rows: Tensor
        #: Makes other rows a nested tensor of the same kind and lengths.
        self.nested: Callable[[Tensor], Tensor]
        if nested.layout == torch.jagged:
            check_jagged("a nested input", nested, 1)
            offsets, shortest, longest = nested.offsets(), nested._min_seqlen, nested._max_seqlen
            self.rows, self.offsets, self.longest = nested.values(), offsets, longest
            self.cu_seqlens = offsets.to(torch.int32)
            self.nested = lambda rows: torch.nested.nested_tensor_from_jagged(
                rows, offsets, min_seqlen=shortest, max_seqlen=longest
            )
            return
        parts = nested.unbind()
        lengths = [part.shape[0] for part in parts]
        self.rows, self.longest = torch.cat(parts), max(lengths)
        self.offsets = F.pad(torch.tensor(lengths, device=nested.device).cumsum(0), (1, 0))
        self.cu_seqlens = self.offsets.to(torch.int32)
        self.nested = lambda rows: torch.nested.as_nested_tensor(list(rows.split(lengths)))
