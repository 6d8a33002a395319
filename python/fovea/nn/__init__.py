"""torch.nn's attention layers on Fovea: the same constructors, calls and state_dicts, fused whatever the options.

    model = fovea.nn.convert(model)       # in place: every MultiheadAttention, TransformerEncoderLayer, ... of it
    print(layer.explain(x, mask=mask))    # what runs, and what would have run in PyTorch

They train, take masks, padding and dropout, and never make the N×N matrix unless its weights are asked for.
"""

from fovea.nn._attention import MultiheadAttention
from fovea.nn._convert import convert
from fovea.nn._encoder import TransformerEncoder, TransformerEncoderLayer
from fovea.nn._explain import LayerReport

__all__ = ["LayerReport", "MultiheadAttention", "TransformerEncoder", "TransformerEncoderLayer", "convert"]
