"""The operators `fovea::attention`, its backward pass and its seed: what torch.compile and torch.export see.

Each has a fake implementation that knows shapes and strides alone, so that graphs are traced without running.  What a
call would be refused for as far as they tell, that of `attention` refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fovea import _core
from fovea._arguments import ARRAYS, extras, rules
from fovea.torch import _seeds

_SHARED = (
    "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sink, Tensor? q_lengths, Tensor? kv_lengths,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv, SymInt? max_seqlen_q, SymInt? max_seqlen_kv, Tensor? seed,"
    " float? softmax_scale, str? causal, SymInt? window_left, SymInt? window_right, float softcap, float dropout_p,"
    " bool deterministic, str layout, str? backend, bool strict"
)
_NUM_EXTRAS = 10  # what belongs to `extras` comes first, then the seed
_TENSORS = ("q", "k", "v", *ARRAYS)
_DLPACK_DEVICES = {"cpu": 1, "cuda": 2, "meta": 1, "mps": 8, "xpu": 14}  # a meta tensor passes for one on the CPU

_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since PyTorch 2.7

#: What a gradient answers that is differentiated again.
ONCE = (
    "fovea.attention has no second derivatives, and a gradient of it was differentiated again: do without"
    " create_graph=True, or compute this part by PyTorch's formula, scaled_dot_product_attention of"
    " torch.nn.functional under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
)

_library = torch.library.Library("fovea", "DEF")
_library.define(f"attention(Tensor q, Tensor k, Tensor v, {_SHARED}) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {_SHARED}, bool dbias, bool dalibi_slopes, bool dsink) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# With all that `attention` takes: for a call that is refused no seed is drawn.
_library.define(
    f"draw_seed(Tensor q, Tensor k, Tensor v, {_SHARED}, Tensor? out) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)

attention = torch.ops.fovea.attention.default
attention_backward = torch.ops.fovea.attention_backward.default
draw_seed = torch.ops.fovea.draw_seed.default


class Options:
    """The arguments after q, k and v as the compiled half takes them."""

    def __init__(self, shared: Sequence[Any]) -> None:
        self.extras = extras(*shared[:_NUM_EXTRAS])
        seed, *scalars = shared[_NUM_EXTRAS:]
        self.rules = rules(*scalars)
        self.seed, self.offset = (None, 0) if seed is None else _seeds.from_tensor(seed)


def in_rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor with its last dimension contiguous; gradients come in all kinds of strides, and negated by a bit."""
    if tensor is None:
        return None
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def _attention(q: Tensor, k: Tensor, v: Tensor, *shared: Any) -> tuple[Tensor, Tensor]:
    options = Options(shared)
    return _core.forward(q, k, v, options.extras, options.rules, options.seed, options.offset, True, None)


def _attention_backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *shared, dbias, dalibi_slopes, dsink = rest
    options = Options(shared)
    dout = torch.zeros_like(out) if dout is None else in_rows(dout)
    wanted = dbias + 2 * dalibi_slopes + 4 * dsink
    gradients = _core.backward(
        dout,
        in_rows(dlse),
        q,
        k,
        v,
        out,
        lse,
        options.extras,
        options.rules,
        options.seed,
        options.offset,
        wanted,
    )
    return tuple(q.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _draw_seed(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    *shared, out = rest
    options = Options(shared)
    _core.check(q, k, v, options.extras, options.rules, out)
    return _seeds.to_tensor(*_seeds.draw(q.device))


for _name, _run in (("attention", _attention), ("attention_backward", _attention_backward), ("draw_seed", _draw_seed)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")


class _Open(Exception):
    """A size is not known before the call runs."""


def _known(number: Any) -> Any:
    """A number as it is while somebody traces, without a guard: another one is checked when the call runs."""
    if not isinstance(number, (torch.SymInt, torch.SymFloat)):
        return number
    hint = getattr(number.node, "hint", None)
    if hint is None:
        raise _Open
    return hint


def outline(like: Tensor, shape: Sequence[Any], strides: Sequence[Any]) -> _core.Outline:
    """A tensor of this shape with the dtype and device of another."""
    dtype, device = like.dtype, like.device
    if dtype == torch.bool:
        code = 6
    elif dtype == torch.bfloat16:
        code = 4
    elif dtype.is_complex:
        code = 5
    elif dtype.is_floating_point:
        code = 2 if dtype.itemsize > 1 else 7
    else:
        code = 0 if dtype.is_signed else 1
    return _core.Outline(
        [_known(size) for size in shape],
        [_known(stride) for stride in strides],
        code,
        8 * dtype.itemsize,
        _DLPACK_DEVICES.get(device.type, 12),
        device.index or 0,
    )


def _refusal(*given: Any) -> ValueError | None:
    """What a call of tensors without data would be refused for, as far as it is known before it runs."""
    meta = given[0].is_meta
    tensors: list[Any] = []
    try:
        for name, tensor in zip(_TENSORS, given):
            if tensor is not None and tensor.is_meta != meta:
                return ValueError(f"{name} is on {tensor.device} but q on {given[0].device}; give both on one device")
            tensors.append(None if tensor is None else outline(tensor, tensor.shape, tensor.stride()))
        q, k, v, *arrays = tensors
        max_seqlen_q, max_seqlen_kv, _, *scalars = given[len(_TENSORS) :]  # between them the seed, of any kind
        others = extras(*arrays, _known(max_seqlen_q), _known(max_seqlen_kv))
        _core.check(q, k, v, others, rules(*map(_known, scalars)), None)
    except _Open:
        return None
    except ValueError as error:
        return error
    return None


def _empty_tokens(like: Tensor, shape: Sequence[Any], layout: str) -> Tensor:
    """A token's heads lie side by side in either layout."""
    if layout == "bshd" or len(shape) != 4:
        return like.new_empty(shape)
    batch, heads, seqlen, dim = shape
    return like.new_empty((batch, seqlen, heads, dim)).transpose(1, 2)


@torch.library.register_fake("fovea::attention", lib=_library)
def _(q: Tensor, k: Tensor, v: Tensor, *shared: Any) -> tuple[Tensor, Tensor]:
    error = _refusal(q, k, v, *shared)
    if error is not None:
        if _exporting() or not torch.compiler.is_compiling():
            raise error
        # A compiled call raises it when it runs; here torch.compile would wrap it in pages of its own.
        if q.dim() not in (3, 4) or v.dim() == 0:
            return torch.empty_like(q), torch.empty_like(q, dtype=torch.float32)
    layout = shared[-3]
    out = _empty_tokens(q, (*q.shape[:-1], v.shape[-1]), layout)
    if q.dim() == 3:
        rows = (q.shape[1], q.shape[0])
    else:
        batch, *inner = q.shape[:-1]
        rows = (batch, *(inner if layout == "bhsd" else reversed(inner)))
    return out, q.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("fovea::attention_backward", lib=_library)
def _(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *shared, dbias, dalibi_slopes, dsink = rest
    layout = shared[-3]
    gradients = [_empty_tokens(tensor, tensor.shape, layout) for tensor in (q, k, v)]
    for tensor, wanted in ((shared[1], dbias), (shared[2], dalibi_slopes), (shared[3], dsink)):
        gradients.append(tensor.new_empty(tensor.shape) if wanted else q.new_empty(0))
    return tuple(gradients)


@torch.library.register_fake("fovea::draw_seed", lib=_library)
def _(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty(2, dtype=torch.int64, device="cpu")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.others = [None if is_tensor else value for value, is_tensor in zip(inputs, ctx.is_tensor)]
    ctx.save_for_backward(*output, *(value for value in inputs if isinstance(value, Tensor)))


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = list(ctx.others)
    if dout is None and dlse is None:
        return (None,) * len(inputs)
    out, lse, *tensors = ctx.saved_tensors
    saved = iter(tensors)
    inputs = [next(saved) if is_tensor else value for value, is_tensor in zip(inputs, ctx.is_tensor)]
    needed = ctx.needs_input_grad
    # mask, bias, alibi_slopes and sink follow q, k and v.
    wanted = [bool(inputs[place] is not None and needed[place]) for place in (4, 5, 6)]
    q, k, v, *shared = inputs
    dq, dk, dv, dbias, dalibi_slopes, dsink = attention_backward(dout, dlse, q, k, v, out, lse, *shared, *wanted)
    gradients: list[Tensor | None] = [None] * len(inputs)
    gradients[:3] = dq, dk, dv
    for place, gradient, want in zip((4, 5, 6), (dbias, dalibi_slopes, dsink), wanted):
        gradients[place] = gradient if want else None
    return tuple(gradients)


def _refuse_again(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError(ONCE)


torch.library.register_autograd("fovea::attention", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("fovea::attention_backward", _refuse_again, lib=_library)


def _refuse_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    raise RuntimeError(
        "fovea.attention does not run under vmap; give q, k and v the batch dimension instead, which it takes as it is"
    )


for _name in ("attention", "attention_backward"):
    torch.library.register_vmap(f"fovea::{_name}", _refuse_vmap, lib=_library)
