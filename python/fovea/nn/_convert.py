"""One line that puts Fovea's layers into a model."""

from __future__ import annotations

from typing import TypeVar

import torch

from fovea.nn._attention import MultiheadAttention
from fovea.nn._encoder import TransformerEncoder, TransformerEncoderLayer

_OURS: dict[type, type] = {
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerEncoder: TransformerEncoder,
}

_Module = TypeVar("_Module", bound=torch.nn.Module)


def convert(model: _Module, *, pack_padding: bool = False) -> _Module:
    """Makes every attention layer of torch.nn in a model Fovea's, in place, the model itself included.

    Parameters, hooks, names, optimisers' references and the training mode stay what they are: a layer only gets another
    class. Subclasses are left alone; what they have inside is not.

    Args:
        model: any module.
        pack_padding: the attribute of that name of all layers, torch.nn's and Fovea's.

    Returns:
        The same model.
    """
    for module in model.modules():
        module.__class__ = _OURS.get(type(module), type(module))
        if type(module) in _OURS.values():
            module.pack_padding = pack_padding
    return model
