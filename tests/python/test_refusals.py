"""What a call is refused for: in the same sentence whoever looks at it, and before a seed is drawn."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import fovea


def tensors(**like):
    return tuple(torch.randn(shape, **like) for shape in ((2, 9, 4, 16), (2, 11, 2, 16), (2, 11, 2, 8)))


def ones(q, *shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device=q.device)


def packed(q, k, v, **options):
    ends = {
        f"cu_seqlens_{of}": torch.arange(2, dtype=torch.int32, device=q.device) * len(x[0])
        for of, x in (("q", q), ("kv", k))
    }
    return fovea.attention(q[0], k[0], v[0], **ends, **{"max_seqlen_q": 9, "max_seqlen_kv": 11} | options)


class Subclass(torch.Tensor):
    pass


class Module(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *given):
        return self.call(*given)


def faked(call, *given):
    with FakeTensorMode() as mode:
        return call(*(mode.from_tensor(x) for x in given))


WAYS = {
    "meta": lambda call, *given: call(*(x.to("meta") for x in given)),
    "fake": faked,
    "a subclass": lambda call, q, k, v: call(q.as_subclass(Subclass), k, v),
    "compiled": lambda call, *given: torch.compile(call, backend="aot_eager")(*given),
    "exported": lambda call, *given: torch.export.export(Module(call), given),
}

TENSORS = {
    "heads": lambda q, k, v: fovea.attention(q[:, :, :3], k, v),
    "lengths of k and v": lambda q, k, v: fovea.attention(q, k[:, :5], v),
    "dimensions": lambda q, k, v: fovea.attention(q[0], k, v),
    "five dimensions": lambda q, k, v: fovea.attention(q[None], k[None], v[None]),
    "no dimensions": lambda q, k, v: fovea.attention(q, k, v[0, 0, 0, 0]),
    "dtypes": lambda q, k, v: fovea.attention(q, k.half(), v),
    "float64": lambda q, k, v: fovea.attention(q.double(), k.double(), v.double()),
    "complex": lambda q, k, v: fovea.attention(q.to(torch.complex64), k, v),
    "8 bits": lambda q, k, v: fovea.attention(q, k, v.to(torch.float8_e4m3fn)),
    "bytes": lambda q, k, v: fovea.attention(q, k, v, mask=ones(q, 9, 11, dtype=torch.uint8)),
    "strides": lambda q, k, v: fovea.attention(q.mT.contiguous().mT, k, v),
    "a mask's shape": lambda q, k, v: fovea.attention(q, k, v, mask=ones(q, 9, 10, dtype=torch.bool)),
    "a mask's dtype": lambda q, k, v: fovea.attention(q, k, v, mask=ones(q, 9, 11)),
    "a bias's dtype": lambda q, k, v: fovea.attention(q, k, v, bias=ones(q, 9, 11, dtype=torch.float16)),
    "a sink's shape": lambda q, k, v: fovea.attention(q, k, v, sink=ones(q, 5)),
    "slopes' shape": lambda q, k, v: fovea.attention(q, k, v, alibi_slopes=ones(q, 3, 4)),
    "lengths' dtype": lambda q, k, v: fovea.attention(q, k, v, kv_lengths=ones(q, 2, dtype=torch.int64)),
    "lengths' shape": lambda q, k, v: fovea.attention(q, k, v, q_lengths=ones(q, 3, dtype=torch.int32)),
    "one of two ends": lambda q, k, v: fovea.attention(q[0], k[0], v[0], cu_seqlens_q=ones(q, 2, dtype=torch.int32)),
    "a packed mask's shape": lambda q, k, v: packed(q, k, v, mask=ones(q, 9, 5, dtype=torch.bool)),
    "packed heads first": lambda q, k, v: packed(q, k, v, layout="bhsd"),
}
OPTIONS = {
    "a word for causal": lambda q, k, v: fovea.attention(q, k, v, causal="False"),
    "a flag for causal": lambda q, k, v: fovea.attention(q, k, v, causal=True),
    "a word for dropout": lambda q, k, v: fovea.attention(q, k, v, dropout_p="0.5"),
    "a flag for dropout": lambda q, k, v: fovea.attention(q, k, v, dropout_p=True),
    "too much dropout": lambda q, k, v: fovea.attention(q, k, v, dropout_p=2.0),
    "a window of floats": lambda q, k, v: fovea.attention(q, k, v, window_left=1.5),
    "a window of two": lambda q, k, v: fovea.attention(q, k, v, window_left=(1, 2)),
    "a negative window": lambda q, k, v: fovea.attention(q, k, v, window_right=-1),
    "a word for a scale": lambda q, k, v: fovea.attention(q, k, v, softmax_scale="1"),
    "a flag for a scale": lambda q, k, v: fovea.attention(q, k, v, softmax_scale=True),
    "a scale that fp32 takes for 0": lambda q, k, v: fovea.attention(q, k, v, softmax_scale=1e-50),
    "a scale beyond fp32": lambda q, k, v: fovea.attention(q, k, v, softmax_scale=-1e50),
    "no softcap": lambda q, k, v: fovea.attention(q, k, v, softcap=None),
    "a word for a flag": lambda q, k, v: fovea.attention(q, k, v, deterministic="yes"),
    "a number for a flag": lambda q, k, v: fovea.attention(q, k, v, strict=1),
    "no layout": lambda q, k, v: fovea.attention(q, k, v, layout=None),
    "an unknown layout": lambda q, k, v: fovea.attention(q, k, v, layout="sbhd"),
    "a number for a backend": lambda q, k, v: fovea.attention(q, k, v, backend=3),
    "a longest length of floats": lambda q, k, v: packed(q, k, v, max_seqlen_q=9.5),
    "a list for a mask": lambda q, k, v: fovea.attention(q, k, v, mask=[[True]]),
    "flash_attn's causal": lambda q, k, v: fovea.flash_attn.flash_attn_func(q, k, v, causal="False"),
    "flash_attn's window": lambda q, k, v: fovea.flash_attn.flash_attn_func(q, k, v, window_size=(1.5, 2.0)),
    "flash_attn's scale": lambda q, k, v: fovea.flash_attn.flash_attn_func(q, k, v, 0.5, "x"),
    "a dropout of scaled_dot_product_attention": lambda q, k, v: fovea.torch.scaled_dot_product_attention(
        q, q, q, dropout_p="x"
    ),
}
WRONG = TENSORS | OPTIONS


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()


def refusal(call, *given):
    with pytest.raises((ValueError, TypeError)) as raised:
        call(*given)
    return type(raised.value), str(raised.value)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_what_eager_calls_refuse_is_refused_in_the_same_sentence(call, way):
    expected = refusal(call, *tensors())
    assert "\n" not in expected[1]
    assert refusal(way, call, *tensors()) == expected


@pytest.mark.parametrize("call", OPTIONS.values(), ids=OPTIONS)
def test_where_no_graph_may_break_the_sentence_is_in_what_torch_compile_says(call):
    _, sentence = refusal(call, *tensors())
    with pytest.raises(Exception) as raised:
        torch.compile(call, backend="aot_eager", fullgraph=True)(*tensors())
    assert sentence in str(raised.value).replace("\\'", "'")


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_number_that_eager_calls_take_is_taken(way):
    way(lambda q, k, v: fovea.attention(q, k, v, softmax_scale=Fraction(1, 2), softcap=Fraction(3)), *tensors())


def test_tensors_of_two_devices_are_refused():
    q, k, v = tensors()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q, k, v = (mode.from_tensor(x) for x in (q, k, v))
        with pytest.raises(ValueError, match="^k is on cuda:1 but the plan is for cpu$"):
            fovea.attention(q, torch.empty_like(k, device="cuda:1"), v)
        with pytest.raises(ValueError, match="^sink is on cuda:0 but the plan is for cuda:1$"):
            on_gpu = [torch.empty_like(x, device="cuda:1") for x in (q, k, v)]
            fovea.attention(*on_gpu, sink=torch.empty(4, device="cuda:0"))
        with pytest.raises(ValueError, match="^bias is on meta but q on cpu; give both on one device$"):
            fovea.attention(q, k, v, bias=torch.empty(9, 11, device="meta"))
        with pytest.raises(ValueError, match="^max_seqlen_q .* must be given where cu_seqlens_q is on a GPU$"):
            packed(*on_gpu, max_seqlen_q=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("seqlen", [9, 1, 0])
def test_what_comes_out_without_data_is_what_comes_out_with_it(layout, dtype, seqlen):
    q, k, v = (x.to(dtype) for x in tensors())
    q = q[:, :seqlen]
    if layout == "bhsd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def call(q, k, v):
        q = q.requires_grad_() if not q.requires_grad and q.is_leaf else q
        out, lse = fovea.attention(q, k, v, layout=layout, return_lse=True)
        return out, lse, torch.autograd.grad(out.float().sum(), q)[0]

    def outlines(results):
        return [(x.shape, x.dtype, x.stride()) for x in results]

    expected = outlines(call(q, k, v))
    for name in ("meta", "fake", "a subclass", "compiled"):
        assert outlines(WAYS[name](call, q.detach(), k, v)) == expected, name


def test_packed_sequences_without_data_may_have_any_lengths():
    q, k, v = tensors()
    for way in (WAYS["meta"], WAYS["fake"], WAYS["compiled"]):
        out = way(lambda *given: packed(*given, max_seqlen_q=None, max_seqlen_kv=None), q, k, v)
        assert (out.shape, out.dtype) == ((9, 4, 8), torch.float32)


def test_sizes_that_are_looked_at_stay_dynamic():
    seen = CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(fovea.attention, fullgraph=True, dynamic=True, backend=seen), set()
    for batch, seqlen, window in ((2, 9, 3), (3, 17, 5), (5, 33, 30)):
        q = torch.randn(batch, seqlen, 4, 16)
        lengths = torch.full((batch,), seqlen, dtype=torch.int32)
        given = dict(mask=torch.ones(seqlen, seqlen, dtype=torch.bool), kv_lengths=lengths, window_left=window)
        assert torch.equal(compiled(q, q, q, **given), fovea.attention(q, q, q, **given))
        counts.add(seen.frame_count)
    assert len(counts) == 1
    with pytest.raises(ValueError, match=r"^mask has the shape \[1, 1, 8, 9\] but must have \[1, 1, 9, 9\]$"):
        q = torch.randn(2, 9, 4, 16)
        given = dict(mask=torch.ones(8, 9, dtype=torch.bool), kv_lengths=lengths[:2] - 30, window_left=3)
        compiled(q, q, q, **given)


REFUSED = {
    "attention": lambda q, k, v: fovea.attention(q, k[:, :5], v, dropout_p=0.5),
    "no heads": lambda q, k, v: fovea.attention(q[:, :, :3], k, v, dropout_p=0.5),
    "a bias": lambda q, k, v: fovea.attention(q, k, v, dropout_p=0.5, bias=torch.zeros(3, 3)),
    "a wrong probability": lambda q, k, v: fovea.attention(q, k, v, dropout_p=1.5),
    "lengths": lambda q, k, v: fovea.attention(
        q, k, v, dropout_p=0.5, kv_lengths=torch.tensor([3, 99], dtype=torch.int32)
    ),
    "an option": lambda q, k, v: fovea.attention(q, k, v, dropout_p=0.5, causal="False"),
    "a backend": lambda q, k, v: fovea.attention(q, k, v, dropout_p=0.5, backend="cpu_none"),
    "an out": lambda q, k, v: fovea.attention(q, k, v, dropout_p=0.5, out=torch.empty(2, 9, 4, 16)),
    "an out with a gradient": lambda q, k, v: fovea.attention(
        q, k, v, dropout_p=0.5, out=torch.empty(2, 9, 4, 8, requires_grad=True)
    ),
    "gradients": lambda q, k, v: fovea.attention(q.requires_grad_(), k, v[:1], dropout_p=0.5),
    "flash_attn": lambda q, k, v: fovea.flash_attn.flash_attn_func(q, k[:, :5], v, dropout_p=0.5),
    "scaled_dot_product_attention": lambda q, k, v: fovea.torch.scaled_dot_product_attention(
        q, q, q, torch.zeros(3, 3), 0.5
    ),
    "a scale": lambda q, k, v: fovea.torch.scaled_dot_product_attention(q, q, q, None, 0.5, scale=1e-50),
}


@pytest.mark.parametrize("way", [None, WAYS["a subclass"], WAYS["compiled"]], ids=["eager", "a subclass", "compiled"])
@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_a_call_that_is_refused_leaves_the_generator_alone(call, way):
    given, before = tensors(), torch.get_rng_state()
    with pytest.raises(ValueError):
        call(*given) if way is None else way(call, *given)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dropout, like", [(1.5, {}), (0.5, {"dtype": torch.float64})], ids=["probability", "float64"])
def test_a_layer_that_refuses_leaves_the_generator_alone(dropout, like, need_weights):
    layer, x = (
        fovea.nn.MultiheadAttention(16, 2, dropout=dropout, batch_first=True, **like),
        torch.randn(2, 3, 16, **like),
    )
    before = torch.get_rng_state()
    with pytest.raises(ValueError):
        layer(x, x, x, need_weights=need_weights)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_with_weights_takes_one_draw_for_all_of_its_calls():
    layer, x = fovea.nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True), torch.randn(2, 3, 16)
    bias = torch.zeros(3, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(3)
        first = layer(x, x, x, attn_mask=bias)
        torch.manual_seed(3)
        assert all(torch.equal(a, b) for a, b in zip(first, layer(x, x, x, attn_mask=bias)))
