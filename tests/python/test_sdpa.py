"""fovea.torch.scaled_dot_product_attention against PyTorch's own, and replace_sdpa on modules as they are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils._python_dispatch import TorchDispatchMode

import fovea
from fovea.torch import replace_sdpa, scaled_dot_product_attention


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(5)


def agree(q_shape, k_shape, v_shape, mask=None, dtype=torch.float32, **options):
    """Forward and every gradient of both, on the same tensors."""
    results = []
    q, k, v = (torch.randn(shape, dtype=dtype) for shape in (q_shape, k_shape, v_shape))
    weight = None
    for attend in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        if isinstance(mask, torch.Tensor) and type(mask) is torch.Tensor and mask.is_floating_point():
            leaves.append(mask.clone().requires_grad_())
            options["attn_mask"] = leaves[-1]
        elif mask is not None:
            options["attn_mask"] = mask
        with sdpa_kernel(SDPBackend.MATH):
            out = attend(*leaves[:3], **options)
        weight = torch.randn(out.shape, dtype=dtype) if weight is None else weight
        results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    close = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=5e-2, atol=5e-2)
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, **close)


def test_plain_causal_and_scale():
    for causal, scale in itertools.product((False, True), (None, 0.3, -0.2)):
        agree((2, 3, 9, 16), (2, 3, 9, 16), (2, 3, 9, 8), is_causal=causal, scale=scale)


def test_causal_starts_at_the_top_left_where_lengths_differ():
    agree((1, 2, 9, 16), (1, 2, 5, 16), (1, 2, 5, 16), is_causal=True)
    agree((1, 2, 5, 16), (1, 2, 9, 16), (1, 2, 9, 16), is_causal=True)


@pytest.mark.parametrize(
    "shape", [(), (7,), (5, 7), (1, 7), (5, 1), (3, 5, 7), (2, 1, 5, 7), (2, 3, 1, 7), (1, 1, 1, 7), (2, 3, 5, 7)]
)
def test_masks_of_every_broadcast(shape):
    keep = torch.rand(shape) > 0.3
    keep[(..., 0) if shape else ...] = True
    agree((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16), mask=keep)
    agree((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16), mask=torch.randn(shape))


def test_masks_of_odd_strides():
    agree((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16), mask=torch.randn(7, 5).t())
    agree((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16), mask=(torch.rand(2, 1, 1, 7) > 0.2).expand(2, 3, 5, 7))
    agree((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16), mask=torch.randn(5, 1).expand(5, 7))


def test_a_row_that_sees_no_key_gives_zero():
    keep = torch.ones(5, 7, dtype=torch.bool)
    keep[2] = False
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for n in (5, 7, 7))
    out = scaled_dot_product_attention(q, k, v, attn_mask=keep)
    assert out[0, 0, 2].eq(0).all() and out.isfinite().all()
    assert torch.autograd.grad(out.sum(), q)[0][0, 0, 2].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_number_hides_as_minus_infinity_does(dtype):
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    masks = [torch.zeros(5, 5, dtype=dtype) for _ in range(2)]
    for mask, hidden in zip(masks, (torch.finfo(dtype).min, -torch.inf), strict=True):
        mask[:, 3] = mask[1] = hidden
    ours = [scaled_dot_product_attention(q, k, v, mask) for mask in masks]
    assert torch.equal(*ours) and ours[0][..., 1, :].eq(0).all()
    gradients = [torch.autograd.grad(out.sum(), (q, k, v)) for out in ours]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_the_causal_masks_of_torch(make):
    agree((1, 2, 5, 16), (1, 2, 8, 16), (1, 2, 8, 16), mask=make(5, 8))


def test_a_causal_mask_of_other_lengths_is_refused_where_they_matter():
    agree((1, 2, 5, 16), (1, 2, 8, 16), (1, 2, 8, 16), mask=causal_upper_left(3, 3))
    agree((1, 2, 5, 16), (1, 2, 8, 16), (1, 2, 8, 16), mask=causal_lower_right(8, 8))
    q, k = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match=r"causal_lower_right\(4, 8\), but query and key have 5 and 8 rows"):
        scaled_dot_product_attention(q, k, k, attn_mask=causal_lower_right(4, 8))


def test_dropout_of_everything_gives_zero_and_no_gradient():
    agree((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16), dropout_p=1.0)
    agree((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16), dropout_p=1.0, mask=torch.randn(5, 7))


def test_grouped_heads():
    agree((2, 6, 5, 16), (2, 2, 7, 16), (2, 2, 7, 16), enable_gqa=True)
    with pytest.raises(ValueError, match="the query has 6 heads and key and value 2; give enable_gqa=True"):
        scaled_dot_product_attention(torch.randn(2, 6, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16))
    query, key = (
        torch.nested.nested_tensor([torch.randn(n, heads, 8) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
        for heads in (6, 2)
    )
    with pytest.raises(ValueError, match="the query has 6 heads and key and value 2; give enable_gqa=True"):
        scaled_dot_product_attention(query, key, key)
    assert scaled_dot_product_attention(query, key, key, enable_gqa=True).size(1) == 6


@pytest.mark.parametrize(
    "q, k, v",
    [
        ((5, 16), (7, 16), (7, 8)),
        ((3, 5, 16), (3, 7, 16), (3, 7, 8)),
        ((2, 4, 3, 5, 16), (2, 4, 3, 7, 16), (2, 4, 3, 7, 8)),
        ((1, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 8)),
        ((2, 3, 5, 16), (1, 3, 7, 16), (2, 3, 7, 8)),
        ((2, 3, 5, 16), (2, 1, 7, 16), (2, 1, 7, 8)),
        ((2, 3, 5, 16), (2, 1, 7, 16), (2, 3, 7, 8)),
        ((2, 1, 5, 16), (2, 3, 7, 16), (2, 3, 7, 8)),
        ((2, 1, 3, 5, 16), (1, 4, 3, 7, 16), (2, 4, 3, 7, 8)),
        ((3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 8)),
        ((3, 3, 5, 16), (3, 3, 3, 16), (3, 3, 8)),
        ((3, 3, 5, 16), (3, 3, 16), (3, 3, 3, 8)),
    ],
)
def test_other_ranks_and_broadcasting(q, k, v):
    agree(q, k, v)
    if len(q) == 5:
        agree(q, k, v, mask=torch.randn(5, 7))
        agree(q, k, v, mask=torch.randn(2, 1, 1, 5, 7))


@pytest.mark.parametrize(
    "q, k, v",
    [
        ((2, 3, 0, 16), (2, 3, 7, 16), (2, 3, 7, 8)),
        ((0, 3, 5, 16), (0, 3, 7, 16), (0, 3, 7, 8)),
        ((2, 0, 5, 16), (2, 0, 7, 16), (2, 0, 7, 8)),
        ((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 0)),
        ((3, 0, 16), (3, 7, 16), (3, 7, 8)),
        ((3, 5, 16), (3, 0, 16), (3, 0, 8)),
        ((4, 2, 3, 0, 16), (4, 2, 3, 7, 16), (4, 2, 3, 7, 8)),
    ],
)
def test_empty_dimensions(q, k, v):
    agree(q, k, v)


def test_no_head_dim_and_no_keys():
    v = torch.randn(2, 3, 7, 8)
    out = scaled_dot_product_attention(torch.randn(2, 3, 5, 0), torch.randn(2, 3, 7, 0), v)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand(2, 3, 5, 8))
    assert (
        scaled_dot_product_attention(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 0, 4), torch.randn(2, 3, 0, 8))
        .eq(0)
        .all()
    )


def test_odd_strides_are_read_as_they_are():
    q, k, v = (torch.randn(2, 3, 16, 9).transpose(2, 3) for _ in range(3))
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_autocast_and_half():
    agree((2, 3, 9, 16), (2, 3, 9, 16), (2, 3, 9, 16), dtype=torch.bfloat16, is_causal=True)
    q, k, v = (torch.randn(2, 3, 9, 16) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scaled_dot_product_attention(q, k, v).dtype == F.scaled_dot_product_attention(q, k, v).dtype


def test_what_torch_refuses_is_refused():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="attn_mask should not be set when is_causal=True"):
        scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(4, 4, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match="fp64"):
        scaled_dot_product_attention(q.double(), q.double(), q.double())


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_mask_beside_is_causal_is_pytorch_s_to_take_or_to_refuse(dropout_p):
    q, mask = torch.randn(1, 2, 4, 8), torch.ones(4, 4, dtype=torch.bool)
    try:
        expected = F.scaled_dot_product_attention(q, q, q, mask, dropout_p, True)
    except RuntimeError:
        expected = None
    with replace_sdpa() as report:
        if expected is None:
            with pytest.raises(RuntimeError, match="attn_mask should not be set when is_causal=True$"):
                F.scaled_dot_product_attention(q, q, q, mask, dropout_p, True)
        else:
            assert torch.equal(F.scaled_dot_product_attention(q, q, q, mask, dropout_p, True), expected)
    assert report.left.total() == 1 and "attn_mask stands beside is_causal" in str(report)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8])
def test_masks_of_other_dtypes_are_refused_by_their_name(dtype):
    q, layer = torch.randn(1, 4, 8), fovea.nn.MultiheadAttention(8, 2, batch_first=True)
    mask = torch.zeros(4, 4, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    sentence = f"mask is {name} but must be bool, float32 or query's dtype, float32"
    with pytest.raises(ValueError, match=f"^attn_{sentence}$"):
        scaled_dot_product_attention(q, q, q, attn_mask=mask)
    with pytest.raises(ValueError, match=f"^attn_{sentence}$"):
        layer(q, q, q, attn_mask=mask)
    with pytest.raises(ValueError, match=f"^key_padding_{sentence}$"):
        layer(q, q, q, key_padding_mask=mask[:1])


@pytest.mark.parametrize(
    "sentence, q, k, v, mask",
    [
        ("seqlen_kv differs: 7 in key and 1 in value", (3, 5, 16), (3, 7, 16), (3, 1, 8), None),
        ("seqlen_kv differs: 1 in key and 7 in value", (1, 3, 5, 16), (2, 3, 1, 16), (2, 3, 7, 8), None),
        (r"the leading dimensions \[2\] of query, \[4\] of key", (2, 3, 5, 16), (4, 3, 7, 16), (4, 3, 7, 8), None),
        ("key has 2 heads but value 3", (2, 6, 5, 16), (2, 2, 7, 16), (2, 3, 7, 8), None),
        (
            r"attn_mask has the shape \[3, 1, 1, 1, 7\]",
            (2, 2, 3, 5, 16),
            (2, 2, 3, 7, 16),
            (2, 2, 3, 7, 8),
            (3, 1, 1, 1, 7),
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_a_sentence(sentence, q, k, v, mask):
    mask = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=sentence):
        scaled_dot_product_attention(*map(torch.randn, (q, k, v)), attn_mask=mask, enable_gqa=True)


def test_sentences_call_arguments_as_the_caller_does():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    for mask in (torch.zeros(5, 6), torch.ones(5, 6, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"^attn_mask has the shape \[1, 1, 5, 6\] but must have"):
            scaled_dot_product_attention(q, k, k, attn_mask=mask)
    with pytest.raises(ValueError, match="^head_dim differs: 8 in query and 9 in key$"):
        scaled_dot_product_attention(q, torch.randn(1, 2, 7, 9), k)
    with pytest.raises(ValueError, match="^query, key and value must share one dtype"):
        scaled_dot_product_attention(q, k.half(), k)
    with pytest.raises(ValueError, match=r"^scale \(nan\) must be finite"):
        scaled_dot_product_attention(q, k, k, scale=float("nan"))


class Copies(TorchDispatchMode):
    """Elements of what is copied meanwhile."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default:
            self.elements.append(out.numel())
        return out


@pytest.mark.parametrize("lead", [(2, 3), (4, 2, 3)])
def test_an_expanded_mask_is_copied_once(lead):
    q, k = torch.randn(*lead, 5, 8), torch.randn(*lead, 7, 8)
    for mask in (torch.randn(7, 5).T, torch.rand(7, 5).T > 0.3):
        expanded = mask.expand(*lead, 5, 7)
        with Copies() as copies:
            out = scaled_dot_product_attention(q, k, k, attn_mask=expanded)
        assert copies.elements == [35]
        assert torch.equal(out, scaled_dot_product_attention(q, k, k, attn_mask=mask))
    for shape in ((*lead, 6, 7), (*lead[:-1], 4, 5, 7)):
        with pytest.raises(ValueError, match="^attn_mask has the shape"):
            scaled_dot_product_attention(q, k, k, attn_mask=mask[:1].expand(shape))


def test_gradients_of_an_expanded_mask():
    q, k, mask = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(7, 5, requires_grad=True)
    leaf = mask.detach().T.expand(2, 3, 5, 7).requires_grad_()
    for attn_mask, wanted in ((mask.T.expand(2, 3, 5, 7), mask), (leaf, leaf)):
        ours, theirs = (
            torch.autograd.grad(attend(q, k, k, attn_mask=attn_mask).square().sum(), wanted)
            for attend in (scaled_dot_product_attention, F.scaled_dot_product_attention)
        )
        torch.testing.assert_close(ours[0], theirs[0])


def test_dropout_keeps_its_share_and_its_scale():
    q = torch.randn(4, 2, 64, 8)
    weights = scaled_dot_product_attention(q * 0, q * 0, torch.eye(64).expand(4, 2, 64, 64), dropout_p=0.25)
    kept = weights != 0
    assert abs(kept.float().mean() - 0.75) < 0.02
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / (64 * 0.75)))


def test_compiled_without_graph_breaks():
    q, k, v = (torch.randn(2, 3, 9, 16) for _ in range(3))
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    mask = torch.randn(9, 9)
    assert torch.equal(compiled(q, k, v, attn_mask=mask), scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert torch.equal(compiled(q, k, v, is_causal=True), scaled_dot_product_attention(q, k, v, is_causal=True))


def test_replaced_modules_run_on_fovea_and_the_report_says_so():
    original = F.scaled_dot_product_attention
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x, padding = torch.randn(3, 10, 32), torch.zeros(3, 10, dtype=torch.bool)
    padding[1, 6:] = True
    expected = layer(x, src_key_padding_mask=padding)
    with replace_sdpa() as report:
        assert F.scaled_dot_product_attention is not original
        out = layer(x, src_key_padding_mask=padding)
        double = F.scaled_dot_product_attention(*(torch.randn(1, 1, 4, 8, dtype=torch.float64) for _ in range(3)))
    assert F.scaled_dot_product_attention is original and double.dtype == torch.float64
    torch.testing.assert_close(out, expected)
    with replace_sdpa() as evaluation, torch.no_grad():
        layer.eval()(x)
    assert evaluation.replaced.total() == 1 and torch.backends.mha.get_fastpath_enabled()
    assert report.replaced.total() == 1 and report.left.total() == 1
    assert "Fovea ran 1 calls" in str(report) and "float32 mask" in str(report)
    assert "left to PyTorch: float64 on cpu" in str(report) and "takes float32, float16 and bfloat16" in str(report)


def test_replacement_decorates_nests_and_reaches_names_imported_before():
    import judge as module

    module.imported_before = F.scaled_dot_product_attention
    q = torch.randn(1, 1, 4, 8)
    outer = replace_sdpa()

    @replace_sdpa()
    def inside():
        return module.imported_before(q, q, q)

    with outer:
        inside()
        inside()
    F.scaled_dot_product_attention(q, q, q)
    assert outer.replaced.total() == 2 and module.imported_before is F.scaled_dot_product_attention
    del module.imported_before


def test_a_decorated_function_that_runs_inside_itself_counts_every_call_once():
    report = replace_sdpa()
    q = torch.randn(1, 1, 4, 8)

    @report
    def layers(count):
        F.scaled_dot_product_attention(q, q, q)
        if count > 1:
            layers(count - 1)

    layers(3)
    assert report.replaced.total() == 3


def test_decorating_what_runs_after_its_call_is_refused():
    def steps():
        yield 1

    async def serve():
        pass

    for function in (steps, serve):
        with pytest.raises(ValueError, match=f"{function.__name__} runs when its call has returned"):
            replace_sdpa()(function)


def test_is_causal_is_a_bool():
    q = torch.randn(1, 2, 5, 8)
    for causal in ("top_left", "False", 2, 1.0, None, torch.tensor(True)):
        with pytest.raises(TypeError):
            F.scaled_dot_product_attention(q, q, q, is_causal=causal)
        with pytest.raises(TypeError, match="is_causal .* must be True or False"):
            scaled_dot_product_attention(q, q, q, is_causal=causal)
    lower = scaled_dot_product_attention(q, q, q, is_causal=True)
    assert all(scaled_dot_product_attention(q, q, q, is_causal=one).equal(lower) for one in (1, np.True_))
    attend = torch.compile(
        lambda q: scaled_dot_product_attention(q, q, q, is_causal=q.shape[2] > 1), dynamic=True, backend="aot_eager"
    )
    torch.testing.assert_close(attend(q), lower)


@pytest.mark.parametrize("compiled", [False, True])
def test_pytorch_s_formula_has_second_derivatives_under_replacement(compiled):
    q = torch.randn(1, 2, 5, 8, requires_grad=True)

    def attend(q):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, q, q)

    def second(attend):
        (dq,) = torch.autograd.grad(attend(q).square().sum(), q, create_graph=True)
        return torch.autograd.grad(dq.square().sum(), q)[0]

    expected = second(attend)
    with replace_sdpa() as report:
        if compiled:  # whose derivatives are none of ours: what the graph calls tells
            called = []

            def spy(graph, _):
                called.extend(str(node.target) for node in graph.graph.nodes)
                return graph

            torch.compile(attend, fullgraph=True, backend=spy)(q)
            assert any("scaled_dot_product" in target for target in called)
            assert not any("fovea" in target for target in called)
        else:
            torch.testing.assert_close(second(attend), expected)
            with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
                F.scaled_dot_product_attention(q, q, q)
            assert report.replaced.total() == 1 and "formula alone" in str(report)


def test_what_torch_runs_runs_under_replacement():
    attend = F.scaled_dot_product_attention
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    nested = torch.nested.nested_tensor([torch.randn(4, 3, 8), torch.randn(4, 5, 8)])

    def tangent():
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            dual = forward_ad.make_dual(q, torch.ones_like(q))
            return forward_ad.unpack_dual(F.scaled_dot_product_attention(dual, k, v)).tangent

    calls = [
        lambda: torch.vmap(F.scaled_dot_product_attention)(q, k, v),
        lambda: torch.func.grad(lambda q: F.scaled_dot_product_attention(q, k, v).sum())(q),
        lambda: torch.stack([x.sum() for x in F.scaled_dot_product_attention(nested, nested, nested).unbind()]),
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.tensor(True)),
        tangent,
    ]
    with sdpa_kernel(SDPBackend.MATH):  # the others take no mask without dimensions
        expected = [call() for call in calls]
    with replace_sdpa() as report:
        torch.testing.assert_close([call() for call in calls], expected)
    assert F.scaled_dot_product_attention is attend
    assert report.left.total() == 4 and report.replaced.total() == 1, str(report)
    assert "bool mask of no dimensions" in str(report) and "query nested, of 4 dimensions" in str(report)
    with replace_sdpa() as report, torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.scaled_dot_product_attention(q.double(), k.double(), v.double()).dtype == torch.float64
    assert report.left.total() == 1
    with replace_sdpa(), pytest.raises(TypeError, match="query"):
        F.scaled_dot_product_attention(None, k, v)


def test_errors_of_the_caller_stay_those_of_torch_under_replacement():
    q = torch.randn(1, 2, 4, 8)
    with replace_sdpa() as report, pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(3, 3, dtype=torch.bool))
    assert report.left.total() == 1
