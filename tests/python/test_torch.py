"""fovea.attention as a citizen of PyTorch: autograd, compile, export, autocast, vmap, checkpoints, seeds, nesting."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fovea


def tensors(batch=2, seqlen_q=9, seqlen_kv=11, heads=4, kv_heads=2, dim=16, dim_v=16, dtype=torch.float32, grad=True):
    shapes = ((batch, seqlen_q, heads, dim), (batch, seqlen_kv, kv_heads, dim), (batch, seqlen_kv, kv_heads, dim_v))
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(11)
    torch._dynamo.reset()


def test_gradients_through_lse_alone_and_through_out_alone():
    q, k, v = tensors()
    out, lse = fovea.attention(q, k, v, return_lse=True)
    dq_lse, dv_lse = torch.autograd.grad(lse.sum(), (q, v), retain_graph=True)
    assert dq_lse.abs().max() > 0 and dv_lse.abs().max() == 0
    both = torch.autograd.grad(out.sum() + lse.sum(), q, retain_graph=True)[0]
    torch.testing.assert_close(both, dq_lse + torch.autograd.grad(out.sum(), q)[0])


class Subclass(torch.Tensor):
    pass


def heads_first(attend):
    return lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def replaced(q, k, v):
    with fovea.torch.replace_sdpa() as report:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert report.replaced.total() == 1
    return out


DOORS = {
    "attention": fovea.attention,
    "attention, everything given": lambda q, k, v: fovea.attention(
        q, k, v, bias=torch.zeros(9, 9, requires_grad=True), sink=torch.zeros(4, requires_grad=True), dropout_p=0.1
    ),
    "lse": lambda q, k, v: fovea.attention(q, k, v, return_lse=True)[1],
    "the operator": lambda q, k, v: fovea.attention(q.as_subclass(Subclass), k, v),
    "scaled_dot_product_attention": heads_first(fovea.torch.scaled_dot_product_attention),
    "replace_sdpa": heads_first(replaced),
    "flash_attn": fovea.flash_attn.flash_attn_func,
}


@pytest.mark.parametrize("attend", DOORS.values(), ids=DOORS)
def test_a_second_derivative_is_refused_and_not_wrong(attend):
    q, k, v = tensors(seqlen_q=9, seqlen_kv=9, kv_heads=4)
    out = attend(q, k, v)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)  # what comes in wants no gradient
    assert dq.requires_grad
    again = "no second derivatives.*create_graph=True"
    with pytest.raises(RuntimeError, match=again):
        (out.square().mean() + dq.square().sum()).backward()
    (dq,) = torch.autograd.grad(attend(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=again):
        torch.autograd.grad(dq.sum(), k, allow_unused=True)
    with pytest.raises(RuntimeError, match=again):
        torch.autograd.functional.hessian(lambda q: attend(q, k.detach(), v.detach()).sum(), q.detach())


def test_a_graph_of_gradients_that_nobody_differentiates_changes_no_gradient():
    q, k, v = tensors()
    expected = torch.autograd.grad(fovea.attention(q, k, v).square().sum(), (q, k, v))
    assert not any(gradient.requires_grad for gradient in expected)
    assert same(torch.autograd.grad(fovea.attention(q, k, v).square().sum(), (q, k, v), create_graph=True), expected)
    optimiser = torch.optim.SGD([q], 1.0)
    fovea.attention(q, k, v).sum().backward(create_graph=True)
    optimiser.zero_grad(set_to_none=False)
    assert q.grad.eq(0).all() and not q.grad.requires_grad


def test_out_is_written_without_gradients_and_refused_with_them():
    q, k, v = tensors()
    out = torch.empty(2, 9, 4, 16)
    with torch.no_grad():
        assert fovea.attention(q, k, v, out=out) is out
        assert torch.equal(out, fovea.attention(q, k, v))
    with pytest.raises(ValueError, match="out cannot be given where gradients are wanted"):
        fovea.attention(q, k, v, out=out)


def test_writing_out_is_seen_by_whoever_has_saved_it():
    q, k, v = tensors(grad=False)
    weight, out = torch.ones(2, 9, 4, 16, requires_grad=True), fovea.attention(q, k, v)
    product = (weight * out).sum()
    assert fovea.attention(q, -k, v, out=out) is out
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize(
    "sentence, out",
    {
        "out cannot be given where gradients are wanted": torch.empty(2, 9, 4, 16, requires_grad=True),
        "out is a ndarray, which is no PyTorch tensor": torch.empty(2, 9, 4, 16).numpy(),
    }.items(),
)
def test_what_cannot_be_written_is_refused(sentence, out):
    for attend in (fovea.attention, torch.compile(fovea.attention, backend="eager")):
        with pytest.raises(ValueError, match=sentence):
            attend(*tensors(grad=False), out=out)


@pytest.mark.parametrize(
    "attend",
    [fovea.attention, fovea.flash_attn.flash_attn_func, fovea.torch.scaled_dot_product_attention],
    ids=["attention", "flash_attn", "scaled_dot_product_attention"],
)
def test_a_traced_call_is_no_constant(attend):
    first, second = torch.randn(2, 2, 9, 4, 16)
    traced = torch.jit.trace(lambda x: attend(x, x, x) + x, (first,))
    assert torch.equal(traced(second), attend(second, second, second) + second)


def test_a_compiled_call_writes_out_without_graph_breaks():
    q, k, v = tensors(grad=False)
    compiled = torch.compile(fovea.attention, fullgraph=True, backend="aot_eager")
    negated = torch._neg_view(torch.zeros(2, 9, 4, 16))
    for out in (torch.zeros(2, 9, 4, 16), negated):
        assert compiled(q, k, v, out=out) is out
        assert torch.equal(out, fovea.attention(q, k, v))
    with pytest.raises(ValueError, match="out is a view whose sign is only a bit"):
        fovea.attention(q, k, v, out=negated)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(32, 96)
        self.bias = torch.nn.Parameter(torch.randn(1, 4, 12, 12))

    def forward(self, x, lengths):
        q, k, v = self.project(x).view(*x.shape[:2], 3, 4, 8).unbind(2)
        out, lse = fovea.attention(
            q, k, v, bias=self.bias, kv_lengths=lengths, causal="bottom_right", window_left=5, return_lse=True
        )
        return out.flatten(2), lse


def test_inductor_runs_forward_and_backward_without_graph_breaks():
    layer, x, lengths = Layer(), torch.randn(2, 12, 32), torch.tensor([12, 7], dtype=torch.int32)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
    for module in (layer, compiled):
        out, lse = module(x, lengths)
        (out.sum() + lse.square().sum()).backward()
    torch.testing.assert_close(compiled(x, lengths), layer(x, lengths))
    for ours, theirs in zip(layer.parameters(), compiled.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_sizes_may_be_dynamic():
    compiled = torch.compile(fovea.attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (9, 17, 33):
        q, k, v = tensors(seqlen_q=seqlen, seqlen_kv=seqlen + 2)
        out = compiled(q, k, v, causal="bottom_right", layout="bshd")
        assert torch.equal(out, fovea.attention(q, k, v, causal="bottom_right"))
        assert same(
            torch.autograd.grad(out.sum(), (q, k, v)),
            torch.autograd.grad(compiled(q, k, v, causal="bottom_right").sum(), (q, k, v)),
        )


def test_export_keeps_one_operator_and_its_meaning():
    layer, example = Layer(), (torch.randn(2, 12, 32), torch.tensor([12, 7], dtype=torch.int32))
    program = torch.export.export(layer, example)
    assert sum(node.target is torch.ops.fovea.attention.default for node in program.graph.nodes) == 1
    torch.testing.assert_close(program.module()(*example), layer(*example))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_the_operators_keep_what_their_fakes_promise(layout):
    q, k, v = tensors(kv_heads=4, seqlen_q=11, dim_v=8)
    if layout == "bhsd":
        q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v))
    bias = torch.randn(1, 4, 11, 11, requires_grad=True)
    seed = torch.tensor([3, 5])
    rest = (None, bias, None, None, None, None, None, None, None, None, seed, None, "top_left", 4, None, 2.0, 0.1)
    torch.library.opcheck(
        torch.ops.fovea.attention.default, (q, k, v, *rest, False, layout, None, False), raise_exception=True
    )


def test_autocast_casts_as_it_does_for_sdpa():
    q, k, v = tensors()
    bias = torch.randn(1, 4, 9, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fovea.attention(q, k, v, bias=bias)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, fovea.attention(*(x.bfloat16() for x in (q, k, v)), bias=bias))
    assert torch.autograd.grad(out.float().sum(), q)[0].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(fovea.attention, fullgraph=True, backend="aot_eager")(q, k, v, bias=bias)
    assert torch.equal(out, compiled)


def test_autocast_leaves_what_it_leaves_in_sdpa_and_explain_knows():
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fovea.explain(q, k, v).problem.startswith("fwd bf16")
        for dtype, reason in ((torch.float64, "q is fp64"), (torch.int32, "int32")):
            for call in (fovea.attention, fovea.explain):
                with pytest.raises(ValueError, match=reason):
                    call(*(x.detach().to(dtype) for x in (q, k, v)))
        layer, x = fovea.nn.MultiheadAttention(8, 2, batch_first=True).double(), torch.randn(2, 3, 8).double()
        for call in (lambda: layer(x, x, x, need_weights=False), lambda: layer.explain(x)):
            with pytest.raises(ValueError, match="q is fp64"):
                call()


@pytest.mark.parametrize("attend", [attend for attend in DOORS.values() if attend is not DOORS["replace_sdpa"]])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_derivatives_are_refused_and_not_dropped(attend, grad):
    q, k, v = tensors(seqlen_q=9, seqlen_kv=9, kv_heads=4, grad=grad)
    with torch.no_grad() if not grad else torch.enable_grad(), forward_ad.dual_level():
        attend(q, k, v)
        for place in range(3):
            given = [q, k, v]
            given[place] = forward_ad.make_dual(given[place], torch.ones_like(given[place]))
            with pytest.raises(RuntimeError, match=f"{'qkv'[place]} has a tangent, .* no forward-mode derivatives"):
                attend(*given)
        if attend is fovea.attention:
            with pytest.raises(RuntimeError, match="sink has a tangent"):
                attend(q, k, v, sink=forward_ad.make_dual(torch.ones(4), torch.ones(4)))
        x = forward_ad.make_dual(torch.randn(2, 3, 8), torch.ones(2, 3, 8))
        with pytest.raises(RuntimeError, match="has a tangent"):
            fovea.nn.MultiheadAttention(8, 2, batch_first=True)(x, x, x, need_weights=False)


def test_arrays_of_other_frameworks_may_be_masks_biases_and_lengths():
    q, k, v = tensors()
    for name, array in {
        "mask": np.tri(9, 11) > 0,
        "bias": np.ones((9, 11), np.float32),
        "alibi_slopes": np.ones(4, np.float32),
        "sink": np.ones(4, np.float32),
        "kv_lengths": np.array([3, 11], np.int32),
    }.items():
        one, other = (fovea.attention(q, k, v, **{name: x}) for x in (array, torch.from_numpy(array)))
        assert torch.equal(one, other)
        assert same(*(torch.autograd.grad(out.sum(), (q, k, v)) for out in (one, other)))


def test_another_frameworks_array_read_backwards_is_refused():
    q, k, v = tensors(grad=False)
    with pytest.raises(ValueError, match=r"^mask's stride of dimension 1 \(-1 bytes\) must not be negative$"):
        fovea.attention(q, k, v, mask=np.ones((q.shape[1], k.shape[1]), bool)[:, ::-1])


def test_flags_may_be_any_truth():
    assert all(len(fovea.attention(*tensors(grad=False), return_lse=flag)) == 2 for flag in (1, np.True_))


def test_vmap_is_refused_in_a_sentence():
    q, k, v = tensors(grad=False)
    with pytest.raises(RuntimeError, match="does not run under vmap.*give q, k and v the batch dimension"):
        torch.vmap(lambda q: fovea.attention(q, k, v))(q[None])


def test_batches_of_gradients_are_refused_in_a_sentence():
    q, k, v = tensors()
    out = fovea.attention(q, k, v)
    with pytest.raises(RuntimeError, match="does not run under vmap.*one gradient at a time"):
        torch.autograd.grad(out, q, torch.ones(3, *out.shape), is_grads_batched=True)
    layer = fovea.nn.MultiheadAttention(8, 2, batch_first=True)
    with pytest.raises(RuntimeError, match="does not run under vmap"):
        torch.autograd.functional.jacobian(
            lambda x: layer(x, x, x, need_weights=False)[0], torch.randn(2, 3, 8), vectorize=True
        )


def test_tensors_negated_by_a_bit_are_read_with_their_sign():
    q, k, v = tensors(grad=False)
    bias = torch.randn(1, 4, 9, 11)
    negated = [torch._neg_view(x) for x in (q, k, v, bias)]
    out = fovea.attention(*negated[:3], bias=negated[3])
    assert torch.equal(out, fovea.attention(-q, -k, -v, bias=-bias))
    assert torch.equal(
        fovea.torch.scaled_dot_product_attention(q, q, torch._neg_view(q)), -fovea.attention(q, q, q, layout="bhsd")
    )
    for name in ("alibi_slopes", "sink"):
        number = torch.rand(4)
        out, expected = (fovea.attention(q, k, v, **{name: x}) for x in (torch._neg_view(number), -number))
        assert torch.equal(out, expected)
    q.requires_grad_()
    weight = torch.randn(2, 9, 4, 16)
    gradients = [torch.autograd.grad(fovea.attention(q, k, v), q, w)[0] for w in (torch._neg_view(weight), -weight)]
    assert same(gradients[:1], gradients[1:])


def test_a_subclass_and_a_dispatch_mode_see_the_operator():
    seen = []

    class Listen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    q, k, v = tensors(grad=False)
    with Listen():
        out = fovea.attention(q, k, v)
    assert torch.ops.fovea.attention.default in seen
    assert torch.equal(out, fovea.attention(q, k, v))


def dropped(q, k, v, **options):
    """Which entries dropout keeps: with v the identity, out is the matrix of weights."""
    return fovea.attention(q, k, v, dropout_p=0.4, **options) != 0


def identity(length=12):
    q, k = (torch.randn(1, length, 1, 8) for _ in range(2))
    return q, k, torch.eye(length)[None, :, None]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("attend", [fovea.attention, fovea.torch.scaled_dot_product_attention])
def test_meta_tensors_give_meta_tensors(attend, dropout):
    q, k, v = (torch.empty(2, 5, 4, dim, device="meta", dtype=torch.float16) for dim in (8, 8, 6))
    with torch.autocast("cpu"):
        out = attend(q.requires_grad_(), k, v, dropout_p=dropout)
    assert (out.shape, out.dtype, out.device.type) == ((2, 5, 4, 6), torch.float16, "meta")
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_seeds_follow_the_default_generator():
    q, k, v = identity()
    state = torch.get_rng_state()
    first, second = dropped(q, k, v), dropped(q, k, v)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(dropped(q, k, v), first) and torch.equal(dropped(q, k, v), second)
    assert torch.equal(dropped(q, k, v, seed=2**64 - 1), dropped(q, k, v, seed=2**64 - 1))
    assert not torch.equal(dropped(q, k, v, seed=1), dropped(q, k, v, seed=1, offset=1))
    with pytest.raises(ValueError, match=r"^offset \(3\) belongs to a seed, and each call draws both; give seed="):
        dropped(q, k, v, offset=3)


@pytest.mark.parametrize("number", [torch.tensor, np.array], ids=["tensor", "array"])
def test_numbers_in_arrays_are_read_once_and_not_again_in_the_backward(number):
    q, k, v = (torch.randn(12, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "dropout_p": 0.5}
    expected = torch.autograd.grad(
        fovea.attention(q, k, v, seed=7, offset=3, max_seqlen_q=7, max_seqlen_kv=7, **packed).sum(), (q, k, v)
    )
    arrays = {"seed": number(7), "offset": number(3), "max_seqlen_q": number(7), "max_seqlen_kv": number(7)}
    out = fovea.attention(q, k, v, **arrays, **packed)
    for array in arrays.values():
        array -= 3
    assert same(torch.autograd.grad(out.sum(), (q, k, v)), expected)


@pytest.mark.parametrize("name", ["seed", "offset", "max_seqlen_q", "max_seqlen_kv"])
def test_an_array_that_is_no_whole_number_is_refused(name):
    q, k, v = (torch.randn(12, heads, 16) for heads in (4, 2, 2))
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "dropout_p": 0.5, "seed": 1}
    with pytest.raises(ValueError, match=rf"{name} has the shape \[2\] but must be one number"):
        fovea.attention(q, k, v, **packed | {name: torch.tensor([7, 7])})
    with pytest.raises(ValueError, match=rf"{name} \(7.5\) must be a whole number"):
        fovea.attention(q, k, v, **packed | {name: torch.tensor(7.5)})


TRACED = {
    "compiled": lambda call, q: torch.compile(call)(q),
    "a subclass": lambda call, q: call(q.as_subclass(Subclass)),
}


@pytest.mark.parametrize("traced", TRACED.values(), ids=TRACED)
def test_what_eager_calls_refuse_is_refused_where_somebody_traces(traced):
    q, k, v = tensors(grad=False)
    for name in ("seed", "offset"):
        for wrong in (-1, 2**64, 1.5, True):
            given = {"dropout_p": 0.5, "seed": 1, "offset": 0} | {name: wrong}
            for way in (lambda call, q: call(q), traced):
                with pytest.raises(ValueError, match=rf"{name} \({wrong}\) must be a whole number from 0 to 2\^64 - 1"):
                    way(lambda q, given=given: fovea.attention(q, k, v, **given), q)
    for out in (torch.zeros(3, 2, 9, 4, 16), torch.zeros(2, 9, 4, 16, dtype=torch.float16)):
        for way in (lambda call, q: call(q), traced):
            with pytest.raises(ValueError, match="out (is|has) "):
                way(lambda q, out=out: fovea.attention(q, k, v, out=out), q)
        assert not out.any()


def test_a_compiled_call_takes_seeds_that_change():
    q, k, v = tensors(grad=False)

    def dropped(seed, offset):
        return fovea.attention(q, k, v, dropout_p=0.5, seed=seed, offset=offset)

    compiled = torch.compile(dropped, fullgraph=True)
    for seed, offset in ((1, 0), (2, 3), (5, 4), (2**63 - 1, 2**40)):
        assert torch.equal(compiled(seed, offset), dropped(seed, offset))


def test_compiled_calls_draw_a_fresh_seed_each_and_follow_the_generator():
    q, k, v = identity()
    twice = torch.compile(lambda: (dropped(q, k, v), dropped(q, k, v)), fullgraph=True)
    state = torch.get_rng_state()
    first, second = twice()
    third, _ = twice()
    assert not torch.equal(first, second) and not torch.equal(first, third)
    torch.set_rng_state(state)
    assert torch.equal(twice()[0], first)
    assert torch.equal(torch.compile(dropped)(q, k, v, seed=2**64 - 2), dropped(q, k, v, seed=2**64 - 2))


def test_seeds_come_from_the_tensors_device_whatever_the_default_one():
    q, k, v = tensors(grad=False)
    torch.manual_seed(3)
    expected = fovea.attention(q, k, v, dropout_p=0.3)
    torch.manual_seed(3)
    with torch.device("meta"):
        assert torch.equal(fovea.attention(q, k, v, dropout_p=0.3), expected)
        seen = fovea.attention(q.as_subclass(Subclass), k, v, dropout_p=0.3)
        assert seen.device == q.device and not torch.equal(seen, expected)


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: torch.compile(f, backend="aot_eager")])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_recompute_the_same_dropout(reentrant, wrap):
    q, k, v = tensors(seqlen_q=40, seqlen_kv=40)

    def work(q, k, v):
        return fovea.attention(torch.sin(q), k, v, dropout_p=0.5).square()

    torch.manual_seed(3)
    plain = work(q, k, v)
    expected = torch.autograd.grad(plain.sum(), (q, k, v))
    torch.manual_seed(3)
    if reentrant:
        q2, k2, v2 = (x.detach().requires_grad_() for x in (q, k, v))
        out = wrap(lambda *x: checkpoint(work, *x, use_reentrant=True))(q2, k2, v2)
        out.sum().backward()
        gradients = (q2.grad, k2.grad, v2.grad)
    else:
        out = wrap(lambda *x: checkpoint(work, *x, use_reentrant=False))(q, k, v)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(gradients, expected)


def test_nested_tensors_are_packed_sequences():
    lengths = (3, 8, 5)
    parts = [[torch.randn(n, 4, 16) for n in lengths] for _ in range(3)]
    q, k, v = (torch.nested.nested_tensor(part, layout=torch.jagged, requires_grad=True) for part in parts)
    out, lse = fovea.attention(q, k, v, causal="bottom_right", return_lse=True)
    assert out.is_nested and out.shape == q.shape and lse.shape == (4, 16)
    for b, piece in enumerate(out.unbind()):
        alone = fovea.attention(*(part[b][None] for part in parts), causal="bottom_right")[0]
        torch.testing.assert_close(piece, alone)
    (dq,) = torch.autograd.grad(out.values().square().sum(), q)
    heads_first = fovea.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal="bottom_right", layout="bhsd")
    assert torch.equal(heads_first.transpose(1, 2).values(), out.values())
    (dq2,) = torch.autograd.grad(heads_first.transpose(1, 2).values().square().sum(), q)
    torch.testing.assert_close(dq.values(), dq2.values())


@pytest.mark.parametrize("layer", [None, fovea.nn.MultiheadAttention(16, 2)])
def test_compiled_nested_tensors_may_have_sequences_of_any_length(layer):
    def attend(x):
        if layer is None:
            return fovea.attention(*[x.unflatten(-1, (2, 8))] * 3)
        return layer(x, x, x, need_weights=False)[0]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for lengths in ((3, 8, 5), (2, 4, 1, 3), (1, 1), (0, 6)):  # of which torch.compile takes 0 and 1 for constants
        x = torch.nested.nested_tensor([torch.randn(n, 16) for n in lengths], layout=torch.jagged)
        out = compiled(x)
        torch.testing.assert_close(out.values(), attend(x).values())
        assert (out._min_seqlen, out._max_seqlen) == (min(lengths), max(lengths))


def test_nested_tensors_of_another_layout_are_refused():
    parts = [torch.randn(3, 4, 16), torch.randn(5, 4, 16)]
    strided, jagged = (torch.nested.nested_tensor(parts, layout=layout) for layout in (torch.strided, torch.jagged))
    dense = torch.randn(2, 5, 4, 16)
    for given, name in (
        ((strided, strided, strided), "q"),
        ((dense, strided, strided), "k"),
        ((dense, jagged, jagged), "q"),
        ((jagged, jagged, dense), "v"),
    ):
        for call in (fovea.attention, fovea.explain):
            with pytest.raises(ValueError, match=f"^{name} must be a nested tensor of layout torch.jagged"):
                call(*given)
        name = {"q": "query", "k": "key", "v": "value"}[name]
        with pytest.raises(ValueError, match=f"^{name} must be a nested tensor of layout torch.jagged"):
            fovea.torch.scaled_dot_product_attention(*given)


@pytest.mark.parametrize("call", [fovea.attention, fovea.explain])
def test_a_longest_length_of_tensors_that_are_not_packed_is_refused(call):
    x = torch.randn(2, 5, 4, 16, requires_grad=True)
    for name in ("max_seqlen_q", "max_seqlen_kv"):
        with pytest.raises(ValueError, match=rf"^{name} \(5\) belongs to packed sequences; give cu_seqlens_q and cu_"):
            call(x, x, x, **{name: 5})


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"])
def test_lengths_beside_nested_tensors_are_refused(name):
    x = torch.nested.nested_tensor([torch.randn(3, 8, 16), torch.randn(5, 8, 16)], layout=torch.jagged)
    given = {name: torch.tensor([0, 3, 8], dtype=torch.int32) if name.startswith("cu") else 5}
    with pytest.raises(ValueError, match="^nested tensors bring cu_seqlens and max_seqlen along"):
        fovea.attention(x, x, x, **given)


def test_tensors_jagged_in_another_dimension_are_refused():
    parts = [torch.randn(3, 8, 16), torch.randn(5, 8, 16)]  # as many heads as rows: all other sizes would agree
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
    turned = jagged.transpose(1, 2)
    for call in (fovea.attention, fovea.explain):
        with pytest.raises(ValueError, match="^q is jagged in dimension 2 but must be in 1; transpose it"):
            call(turned, turned, turned)
        with pytest.raises(ValueError, match="^k is jagged in dimension 1 but must be in 2; transpose it"):
            call(turned, jagged, jagged, layout="bhsd")
    with pytest.raises(ValueError, match="^query is jagged in dimension 1 but must be in 2; transpose it"):
        fovea.torch.scaled_dot_product_attention(jagged, jagged, jagged)


def test_nested_keys_and_values_of_different_lengths_are_refused():
    def jagged(*lengths):
        return torch.nested.nested_tensor([torch.randn(n, 4, 16) for n in lengths], layout=torch.jagged)

    k, v = jagged(3, 5), jagged(5, 3)
    for call in (fovea.attention, fovea.explain, fovea.torch.scaled_dot_product_attention):
        with pytest.raises(ValueError, match="^k(ey)? and v(alue)? are nested tensors of different lengths"):
            call(*(x.transpose(1, 2) for x in (k, k, v)), **({} if "scaled" in call.__name__ else {"layout": "bhsd"}))
    assert fovea.attention(jagged(2, 2), k, jagged(3, 5)).is_nested


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["torch", "numpy"])
@pytest.mark.parametrize("subclass", [False, True], ids=["plain", "subclass"])
def test_numbers_in_arrays_are_read_anew_in_every_call(make, subclass):
    q, k, v = (x.as_subclass(Subclass) if subclass else x for x in tensors(grad=False))
    given = dict(softmax_scale=make(0.5), softcap=make(20.0), dropout_p=make(0.1), window_left=make(3))
    for scale, cap, p, left in ((0.5, 20.0, 0.1, 3), (2.0, 5.0, 0.4, 1)):
        for array, number in zip(given.values(), (scale, cap, p, left), strict=True):
            array[...] = number
        numbers = dict(softmax_scale=float(given["softmax_scale"]), softcap=cap, dropout_p=float(given["dropout_p"]))
        assert torch.equal(
            fovea.attention(q, k, v, seed=3, **given), fovea.attention(q, k, v, seed=3, **numbers, window_left=left)
        )
    assert "scale=2" in fovea.explain(q.as_subclass(torch.Tensor), k, v, softmax_scale=given["softmax_scale"]).problem


@pytest.mark.parametrize("make", [np.float32, np.float64, torch.tensor])
def test_numbers_in_arrays_are_read_by_compiled_calls_too(make):
    q, k, v = tensors(grad=False)
    compiled = torch.compile(lambda q, scale: fovea.attention(q, k, v, softmax_scale=scale), backend="aot_eager")
    for scale in (0.5, 0.3):
        assert torch.equal(compiled(q, make(scale)), fovea.attention(q, k, v, softmax_scale=float(make(scale))))
    with pytest.raises(ValueError, match="^softmax_scale wants a gradient"):
        compiled(q, torch.tensor(0.5, requires_grad=True))


def test_a_compiled_call_takes_numbers_of_numpy_seeds_and_longest_lengths_without_graph_breaks():
    def attend(q, ends, longest, seed):
        packed = dict(cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest)
        scale = 1 / np.sqrt(q.shape[-1])
        return fovea.attention(*[q[0]] * 3, softmax_scale=scale, dropout_p=0.3, seed=seed, **packed)

    q = tensors(grad=False)[0]
    ends = torch.tensor([0, 4, q.shape[1]], dtype=torch.int32)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for seed in (3, 4):
        arguments = (q, ends, ends.diff().max(), torch.tensor(seed))
        assert torch.equal(compiled(*arguments), attend(*arguments))


@pytest.mark.parametrize("subclass", [False, True], ids=["plain", "subclass"])
def test_a_number_that_wants_a_gradient_is_refused_and_one_of_many_elements(subclass):
    q, k, v = (x.as_subclass(Subclass) if subclass else x for x in tensors(grad=False))
    learnt = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match="^softmax_scale wants a gradient, which a number does not get"):
        fovea.attention(q, k, v, softmax_scale=learnt)
    with torch.no_grad():
        assert torch.equal(fovea.attention(q, k, v, softmax_scale=learnt), fovea.attention(q, k, v, softmax_scale=0.5))
    with pytest.raises(ValueError, match=r"^softcap has the shape \[2\] but must be one number"):
        fovea.attention(q, k, v, softcap=torch.ones(2))


def test_explain_takes_nested_tensors():
    nested = torch.nested.nested_tensor([torch.randn(3, 4, 16), torch.randn(5, 4, 16)], layout=torch.jagged)
    assert "packed=" in fovea.explain(nested, nested, nested).problem


def test_half_precision_keeps_its_dtype_and_bits():
    q, k, v = (x.detach().to(torch.bfloat16) for x in tensors())
    out, lse = fovea.attention(q, k, v, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    exact = fovea.attention(q, k, v, backend="reference")
    assert (out.float() - exact.float()).abs().max() < 2e-2


@pytest.mark.parametrize(
    "sentence, make",
    {
        "q cannot be read by DLPack: Cannot pack tensors on meta": lambda q: (q.to("meta"), q, q),
        "q cannot be read by DLPack": lambda q: (q.to_sparse(), q, q),
        "k is a ndarray, which is no PyTorch tensor": lambda q: (q, q.numpy(), q),
        "q is complex64, which Fovea does not read": lambda q: (q.to(torch.complex64), q, q),
        "q is fp8, which Fovea does not read": lambda q: (q.to(torch.float8_e4m3fn), q, q),
        "q has no dimensions": lambda q: (torch.tensor(1.0), q, q),
        "batch (0) must be at least 1": lambda q: (q[:0], q[:0], q[:0]),
    }.items(),
)
def test_tensors_of_other_kinds_are_refused_in_one_line(sentence, make):
    with pytest.raises(ValueError) as refusal:
        fovea.attention(*make(torch.randn(1, 5, 2, 8)))
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_many_threads_get_the_same_bits():
    from concurrent.futures import ThreadPoolExecutor

    calls = [tensors(seqlen_q=n, grad=False) for n in range(1, 25)]
    expected = [fovea.attention(*call) for call in calls]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert same(pool.map(lambda call: fovea.attention(*call), calls), expected)


def test_pytorch_before_the_exchange_abi_is_served_by_its_adapter():
    from fovea import _frameworks

    adapter = _frameworks.adapter(torch.Tensor, "q")
    made = adapter.make([2, 3, 5], [0, 2, 1], "bf16", "cpu")
    assert made.shape == (2, 5, 3) and made.stride() == (15, 1, 5) and made.dtype == torch.bfloat16
    assert "dltensor" in repr(adapter.export(torch.randn(3, requires_grad=True)))


def test_alibi_and_sink_gradients_have_the_shape_of_their_tensors():
    q, k, v = tensors()
    slopes = torch.rand(2, 4, requires_grad=True)
    sink = torch.randn(4, requires_grad=True)
    out = fovea.attention(q, k, v, alibi_slopes=slopes, sink=sink)
    dslopes, dsink = torch.autograd.grad(out.square().sum(), (slopes, sink))
    step = 1e-2
    with torch.no_grad():
        for tensor, gradient, place in ((slopes, dslopes, (1, 2)), (sink, dsink, (3,))):
            ends = []
            for sign in (1, -1):
                moved = tensor.clone()
                moved[place] += sign * step
                pair = (moved, sink) if tensor is slopes else (slopes, moved)
                ends.append(fovea.attention(q, k, v, alibi_slopes=pair[0], sink=pair[1]).double().square().sum())
            assert math.isclose((ends[0] - ends[1]) / (2 * step), gradient[place], rel_tol=1e-2, abs_tol=1e-3)


def test_pytorch_s_number_of_threads_is_that_of_its_own_pool():
    q = torch.randn(1, 64, 4, 16)
    before, details = torch.get_num_threads(), fovea.explain(q, q, q).details
    try:
        torch.set_num_threads(1)
        assert fovea.explain(q, q, q).details == details
    finally:
        torch.set_num_threads(before)
