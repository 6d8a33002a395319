"""fovea.attention for PyTorch's tensors: eager calls directly, through operators under tracing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling

from fovea import _core
from fovea._arguments import ARRAYS, KINDS, PLAINEST, RULES, extras, longest, now, rules, whole, why_not
from fovea._frameworks import refuse_masked
from fovea.torch import _nested, _ops, _seeds

#: Tensor types without a dispatch of their own.
_PLAIN = (Tensor, torch.nn.Parameter)
#: What autocast casts; float64 and integers stay.
_CAST = (torch.float32, torch.float16, torch.bfloat16)
_NO_EXTRAS = (None,) * 10
any_autocast = torch._C._is_any_autocast_enabled
_WHOLE = (int, torch.SymInt)
_SYMBOLS = {int: (torch.SymInt,), float: (torch.SymFloat, torch.SymInt)}  # numbers that a graph leaves open
_CONSTANTS = (bool, int, float, str, tuple, type(None))  # to torch.compile, which ends a graph at all else
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
tracing = torch._C._get_tracing_state  # of torch.jit.trace, which makes a constant of what no operator returns
_of_old_vmap = torch._C._functorch.is_legacy_batchedtensor


class _Once(torch.autograd.Function):
    """Returns gradients as results of what they were computed from, so that differentiating them raises."""

    @staticmethod
    def forward(ctx: Any, gradients: tuple[Tensor | None, ...], *sources: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if gradient is None else gradient.detach() for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(_ops.ONCE)


def once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A node's backward(ctx, saved, *gradients) whose results refuse to be differentiated again.

    The first saved tensor must be an output of the node, which in the graph depends on all inputs.
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
    """Eager autograd; `extra`: bias, alibi_slopes and sink, if the call has arrays besides q, k and v."""

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
    others = packed_again = None
    no_lengths = cu_seqlens_q is cu_seqlens_kv is max_seqlen_q is max_seqlen_kv is q_lengths is kv_lengths is None
    if not (no_lengths and mask is bias is alibi_slopes is sink is None):
        others = _readable(
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
        )
    if dropout_p and seed is None and offset:
        raise ValueError(f"offset ({offset}) belongs to a seed, and each call draws both; give seed=, or leave it out")
    if dropout_p:
        seed, offset = _number("seed", seed), _number("offset", offset)
    if not plainly_eager(q, k, v):
        q, k, v, others, layout, packed_again = _prepared(q, k, v, others, layout, out)
    options = (
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
    if torch.compiler.is_compiling() or _watched(q, k, v):
        numbers = [_option(name, option) for name, option in zip(RULES, options, strict=True)]
        if out is not None:
            _check_out(out, q, k, v, *(others or ())[1:4])
        if not dropout_p:
            seed_tensor = None
        elif seed is None:
            seed_tensor = _ops.draw_seed(q, k, v, *(others or _NO_EXTRAS), None, *numbers, out)
        elif isinstance(seed, _seeds.Drawn):
            seed_tensor = seed.tensor
        else:
            seed_tensor = _seeds.to_tensor(whole("seed", seed), whole("offset", offset))
        result, lse = _ops.attention(q, k, v, *(others or _NO_EXTRAS), seed_tensor, *numbers)
        if out is not None:
            _check_like(out, result)
            result = out.copy_(result)
        elif packed_again is not None:
            result = packed_again(result)
        return (result, lse) if return_lse else result

    call_rules = rules(*options)
    if isinstance(seed, _seeds.Drawn):
        seed, offset = _seeds.from_tensor(seed.tensor)
    try:
        result = run(q, k, v, others, call_rules, dropout_p, seed, offset, bool(return_lse), out)
    except ValueError as error:
        raise _nested.named(error, q, k, v) from None
    if packed_again is None:
        return result
    return (packed_again(result[0]), result[1]) if return_lse else packed_again(result)


def explain(
    backward: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    others: tuple[Any, ...] | None,
    numbers: tuple[Any, ...],
    layout: str,
    backend: str | None,
    strict: bool,
    out: Any,
) -> _core.Report:
    """fovea.explain, with the tensors and options that `attention` would pass to the compiled half.

    Args:
        others: what `extras` gives.
        numbers: the arguments of `rules` before layout.
    """
    others = None if others is None else _readable(*others)
    try:
        q, k, v, others, layout, _ = _prepared(q, k, v, others, layout, out)
        return _core.explain(backward, q, k, v, others, rules(*numbers, layout, backend, strict))
    except ValueError as error:
        raise _nested.named(error, q, k, v) from None


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
    """An eager call, with autograd where gradients are needed."""
    extra = () if others is None else others[1:4]  # bias, alibi_slopes, sink
    if out is not None:
        _check_out(out, q, k, v, *extra)
    if dropout_p and seed is None:
        _core.check(q, k, v, others, call_rules, out)  # a call that is refused draws nothing
        seed, offset = _seeds.draw(q.device)
    if not torch.is_grad_enabled() or not (
        q.requires_grad or k.requires_grad or v.requires_grad or (extra and _any_needs_grad(extra))
    ):
        result = _core.forward(q, k, v, others, call_rules, seed, offset, return_lse, out)
        if out is not None:
            increment_version(out)  # so that a backward pass that has saved it raises
        return result
    return _Attention.apply(q, k, v, others, call_rules, seed, offset, return_lse, *extra)


def drawn(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> _seeds.Drawn:
    """A seed for several calls, of which this is one; a call that is refused draws nothing."""
    others = extras(*[options.get(name) for name in (*ARRAYS, "max_seqlen_q", "max_seqlen_kv")])
    numbers = [_option(name, options.get(name, default)) for name, default in PLAINEST.items()]
    q, k, v, others, _, _ = _prepared(q, k, v, others, "bshd", None)
    return _seeds.Drawn(_ops.draw_seed(q, k, v, *(others or _NO_EXTRAS), None, *numbers, None))


def plainly_eager(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a call can go straight to the library: no tracing, no autocast, no special tensors."""
    return not (is_dynamo_compiling() or any_autocast() or special(q, k, v))


def special(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the compiled half cannot read some tensor, or operators have to be seen (`_watched`)."""
    return (
        _watched(q, k, v)
        or forward_ad._current_level >= 0
        or q.is_neg()  # negated by a bit, which DLPack does not carry
        or k.is_neg()
        or v.is_neg()
    )


def in_transform(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active."""
    return _transforms() is not None or (
        forward_ad._current_level >= 0 and any(x is not None and _has_tangent(x) for x in tensors)
    )


def only_tensors(**named: Any) -> None:
    """Refuses what is not a PyTorch tensor."""
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}, which is no PyTorch tensor; give PyTorch tensors")


def as_autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor as autocast gives it to an operator that runs in dtype."""
    return tensor.to(dtype) if tensor.dtype in _CAST else tensor


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor is; PyTorch has none for meta tensors, and raises if asked."""
    return any_autocast() and not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def dtype_under_autocast(tensor: Tensor) -> torch.dtype:
    """The dtype in which an operator gets the tensor."""
    casts = tensor.dtype in _CAST and autocasts(tensor)
    return torch.get_autocast_dtype(tensor.device.type) if casts else tensor.dtype


def check_mask(name: str, mask: Tensor, query: Tensor) -> None:
    """Refuses a mask of a dtype that attention does not add, by the caller's name: attention calls it a bias."""
    if mask.dtype in (torch.bool, torch.float32) or dtype_under_autocast(mask) == dtype_under_autocast(query):
        return
    got, wanted = (str(dtype).removeprefix("torch.") for dtype in (mask.dtype, query.dtype))
    raise ValueError(f"{name} is {got} but must be bool, float32 or query's dtype, {wanted}")


def _readable(*others: Any) -> tuple[Any, ...]:
    """What `extras` gives, with arrays of any framework as PyTorch tensors without a negation bit."""
    *arrays, max_seqlen_q, max_seqlen_kv = others
    for place, array in enumerate(arrays):
        if array is None:
            continue
        if is_dynamo_compiling():  # to which arrays of NumPy are tensors, and no bit is known
            if not hasattr(array, "__dlpack__"):
                raise ValueError(_no_array(ARRAYS[place], array))
            continue
        if type(array) in _PLAIN and not array.is_neg():
            continue
        if not isinstance(array, Tensor):
            array = _from_elsewhere(ARRAYS[place], array)
        arrays[place] = array.resolve_neg()
    return (*arrays, _longest("max_seqlen_q", max_seqlen_q), _longest("max_seqlen_kv", max_seqlen_kv))


def _longest(name: str, value: Any) -> Any:
    number = _number(name, value)
    return number if number is None or isinstance(number, _WHOLE) else longest(name, number)


def _option(name: str, value: Any) -> Any:
    """An option of `rules` as the operator takes it; of other types it refuses some in words of its own."""
    kinds = KINDS[name]
    if type(value) in kinds:  # a line, for torch.compile takes its time with each
        return value
    number = _number(name, value)
    if isinstance(number, bool) != (bool in kinds) or not isinstance(number, (*kinds, *_SYMBOLS.get(kinds[0], ()))):
        refusal = (_why_not_constant if isinstance(number, _CONSTANTS) else why_not)(name, number)
        if refusal:
            raise ValueError(refusal)
        return kinds[0](number)
    return number


@torch.compiler.assume_constant_result
def _why_not_constant(name: str, option: Any) -> str:
    return why_not(name, option)


def _number(name: str, value: Any) -> Any:
    """The number in an array as it is now, also under torch.compile, to which every number of NumPy is an array."""
    if not is_dynamo_compiling():
        number = now(name, value)
        return number.item() if hasattr(number, "item") else number  # NumPy's own, too, for a graph that goes on
    if isinstance(value, Tensor):
        return now(name, value)
    if value is None or isinstance(value, (int, float, str, _seeds.Drawn)) or not hasattr(value, "item"):
        return value
    return value.item()


def _no_array(name: str, array: Any) -> str:
    return f"{name} is a {type(array).__name__}, which is no array: give a tensor, or what speaks DLPack"


def _from_elsewhere(name: str, array: Any) -> Tensor:
    """A tensor in the memory of an array of another framework."""
    if not hasattr(array, "__dlpack__"):
        raise ValueError(_no_array(name, array))
    refuse_masked(type(array))
    for dimension, stride in enumerate(getattr(array, "strides", None) or ()):
        if stride < 0:  # at which from_dlpack ends the process
            raise ValueError(f"{name}'s stride of dimension {dimension} ({stride} bytes) must not be negative")
    try:
        return torch.from_dlpack(array)
    except (BufferError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{name} cannot be read by DLPack: {why}") from None


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, others: tuple[Any, ...] | None, layout: str, out: Any
) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...] | None, str, Callable[[Tensor], Tensor] | None]:
    """Tensors of all kinds as the compiled half takes them, their layout, and how to make out nested again."""
    if not is_dynamo_compiling():
        only_tensors(q=q, k=k, v=v)
        _refuse_transforms()
        if forward_ad._current_level >= 0:
            _refuse_tangents(("q", "k", "v", *ARRAYS[1:4]), (q, k, v, *(others or ())[1:4]))
        q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()
    if autocasts(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = as_autocast(q, dtype), as_autocast(k, dtype), as_autocast(v, dtype)
        others = cast_bias(others, dtype)
    if not (q.is_nested or k.is_nested or v.is_nested):
        return q, k, v, others, layout, None
    others = others or _NO_EXTRAS
    if out is not None or any(given is not None for given in others[6:]):
        raise ValueError("nested tensors bring cu_seqlens and max_seqlen along and make their own out; leave them out")
    q, k, v, *lengths, packed_again = _nested.unpack(q, k, v, layout)
    return q, k, v, (*others[:6], *lengths), "bshd", packed_again


def cast_bias(others: tuple[Any, ...] | None, dtype: torch.dtype) -> tuple[Any, ...] | None:
    """What `extras` gives under autocast: a bias stays in fp32, which costs nothing, or follows q."""
    if others is None or others[1] is None or others[1].dtype == torch.float32:
        return others
    mask, bias, *rest = others
    return (mask, as_autocast(bias, dtype), *rest)


def flag(name: str, value: Any) -> bool:
    """A bool, NumPy's, 0 or 1: Python takes "False" and "top_left" for true as well."""
    of_numpy = type(value).__module__ == "numpy" and str(getattr(value, "dtype", "")) == "bool" and value.ndim == 0
    if not (isinstance(value, (bool, torch.SymBool)) or of_numpy or isinstance(value, int) and value in (0, 1)):
        raise TypeError(f"{name} ({value!r}) must be True or False")
    return bool(value)


def _refuse_tangents(names: tuple[str, ...], tensors: tuple[Tensor | None, ...]) -> None:
    for name, tensor in zip(names, tensors):
        if tensor is not None and _has_tangent(tensor):
            raise RuntimeError(
                f"{name} has a tangent, and fovea.attention has no forward-mode derivatives; use torch.autograd.grad,"
                " or compute this part by PyTorch's formula, scaled_dot_product_attention of torch.nn.functional under"
                " torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            )


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def _check_out(out: Any, *sources: Tensor | None) -> None:
    only_tensors(out=out)
    if torch.is_grad_enabled() and _any_needs_grad((out, *sources)):
        raise ValueError("out cannot be given where gradients are wanted; call under torch.no_grad() or leave it out")
    if not is_dynamo_compiling() and out.is_neg():  # compiled, copy_ writes it, which minds the bit
        raise ValueError("out is a view whose sign is only a bit, and would read what is written negated; give another")


def _check_like(out: Tensor, result: Tensor) -> None:
    """Refuses an out that copy_ would broadcast, convert or move to."""
    if (out.shape, out.dtype, out.device) != (result.shape, result.dtype, result.device):
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} on {out.device} but must be {result.dtype} {list(result.shape)}"
            f" on {result.device}"
        )


def _refuse_transforms(*gradients: Tensor | None) -> None:
    """Refuses transforms of torch.func, and the older vmap of is_grads_batched."""
    if _transforms() is not None or any(x is not None and _of_old_vmap(x) for x in gradients):
        raise RuntimeError(
            "fovea.attention does not run under vmap, grad and the other transforms of torch.func; give q, k and v the"
            " batch dimension in place of vmap, and use torch.autograd, one gradient at a time, in place of grad"
        )


def _watched(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a tensor subclass, a dispatch mode, tracing or a transform has to see operators."""
    return (
        type(q) not in _PLAIN
        or type(k) not in _PLAIN
        or type(v) not in _PLAIN
        or (q.is_meta and k.is_meta and v.is_meta)  # which the operators' fake implementations answer
        or _modes() != 0
        or _transforms() is not None
        or tracing() is not None
    )


def _any_needs_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
