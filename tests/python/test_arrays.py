"""fovea.attention and fovea.explain for NumPy, and what both refuse."""

from __future__ import annotations

import copy
import ctypes
import inspect
import pickle

import numpy as np
import pytest
import torch

import fovea
from fovea import _frameworks


def arrays(batch=2, seqlen_q=5, seqlen_kv=7, heads=4, kv_heads=2, dim=8, dim_v=6, dtype=np.float32):
    random = np.random.default_rng(3)
    shapes = ((batch, seqlen_q, heads, dim), (batch, seqlen_kv, kv_heads, dim), (batch, seqlen_kv, kv_heads, dim_v))
    return tuple(random.standard_normal(shape).astype(dtype) for shape in shapes)


def plain(q, k, v, visible=None):
    """The formula in double precision."""
    q, k, v = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])
    if visible is not None:
        scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3)


def test_numpy_arrays_agree_with_the_formula():
    q, k, v = arrays()
    np.testing.assert_allclose(fovea.attention(q, k, v), plain(q, k, v), atol=2e-6)


@pytest.mark.parametrize("shape", [(5, 7), (4, 5, 7), (1, 1, 5, 7), (2, 1, 1, 7)])
def test_masks_broadcast_from_the_right(shape):
    q, k, v = arrays()
    mask = np.random.default_rng(5).random(shape) > 0.3
    mask[..., 0] = True
    np.testing.assert_allclose(fovea.attention(q, k, v, mask=mask), plain(q, k, v, mask), atol=2e-6)


def test_nothing_is_copied_on_the_way_in_or_out():
    q, k, v = arrays()
    wide = np.zeros((2, 5, 4, 12), np.float32)
    wide[..., :8] = q
    out = np.full((2, 5, 4, 9), np.nan, np.float32)
    returned = fovea.attention(wide[..., :8], k, v, out=out[..., :6])
    assert np.shares_memory(returned, out)
    np.testing.assert_array_equal(out[..., :6], fovea.attention(q, k, v))
    assert np.isnan(out[..., 6:]).all()


def test_layouts_mean_the_same():
    q, k, v = arrays()
    out, lse = fovea.attention(q, k, v, return_lse=True, causal="top_left")
    heads_first = [x.transpose(0, 2, 1, 3) for x in (q, k, v)]
    out2, lse2 = fovea.attention(*heads_first, return_lse=True, causal="top_left", layout="bhsd")
    assert out2.shape == (2, 4, 5, 6)
    np.testing.assert_array_equal(out2.transpose(0, 2, 1, 3), out)
    np.testing.assert_array_equal(lse2, lse)


def test_frameworks_may_meet_in_one_call_and_agree_bit_by_bit():
    q, k, v = arrays()
    ours = fovea.attention(q, k, v, mask=torch.ones(5, 7, dtype=torch.bool))
    theirs = fovea.attention(*(torch.from_numpy(x) for x in (q, k, v)))
    assert isinstance(theirs, torch.Tensor)
    np.testing.assert_array_equal(ours, theirs.numpy())


class Foreign:
    """A NumPy array that says that it is on a GPU, of a framework whose current stream is `current`."""

    current = 0

    def __init__(self, array):
        self.array, self.streams = array, []

    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        capsule = self.array.__dlpack__()
        address = ctypes.pythonapi.PyCapsule_GetPointer
        address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        ctypes.c_int32.from_address(address(capsule, b"dltensor") + 8).value = 2  # DLPack's kDLCUDA
        return capsule


class Here(Foreign):
    current = 7


class There(Foreign):
    current = 9


class Default(Foreign):
    pass


class Adapter:
    def __init__(self, array_type):
        self.array_type = array_type

    def export(self, array):
        return array.__dlpack__()

    def stream(self, device):
        return self.array_type.current


def test_work_that_another_framework_has_queued_comes_first(monkeypatch):
    monkeypatch.setattr(_frameworks, "adapter", lambda array_type, _: Adapter(array_type))
    for ours, theirs, asked in ((Here, There, [None, 7]), (Default, There, [None, 1]), (Here, Here, [None])):
        given = [ours(x) for x in arrays()]
        mask = theirs(np.random.default_rng(5).random((5, 7)) > 0.3)
        fovea.explain(*given, mask=mask)
        assert mask.streams == asked and all(x.streams == [None] for x in given)


class Bfloat16:
    """On the CPU, of no framework that Fovea knows."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_a_dtype_that_the_result_cannot_have_is_refused_in_a_sentence():
    given = [Bfloat16(torch.from_numpy(x).bfloat16()) for x in arrays()]
    with pytest.raises(ValueError, match="^the result is bf16, which arrays of this kind cannot hold"):
        fovea.attention(*given)


def test_the_report_names_the_backend_that_runs_and_says_why_others_do_not():
    q, k, v = arrays()
    report = fovea.explain(q, k, v, causal="bottom_right", window_left=2)
    assert report.problem == "fwd fp32 b2 hq4 hkv2 sq5 skv7 d8 dv6 causal=bottom_right window=2,-"
    assert report.backend.startswith("cpu_") and report.device == "cpu"
    assert report.workspace_bytes > 0 and dict(report.details)["instruction set"] in report.backend
    assert report.reasons[report.backend] == [] and "GPU" in report.reasons["cuda_portable"][0]
    assert str(report).startswith(report.problem + "\non cpu: " + report.backend)
    assert fovea.explain(q, k, v, backward=True).problem.startswith("bwd ")
    assert fovea.explain(q, k, v, backend="reference").backend == "reference"


q, k, v = arrays()
REFUSED = {
    "causal ('lower') must be 'top_left', 'bottom_right' or None": dict(causal="lower"),
    "causal (True) must be 'top_left', 'bottom_right' or None": dict(causal=True),
    "layout (None) must be 'bshd' or 'bhsd'": dict(layout=None),
    "backend (3) must be a backend's name or None": dict(backend=3),
    "softcap (1e-50) must be 0 or of a size that fp32 holds": dict(softcap=1e-50),
    "softcap (1e+50) must be 0 or of a size that fp32 holds": dict(softcap=1e50),
    "window_left (1.5) must be a whole number of 64 bits": dict(window_left=1.5),
    "window_right (-3) must be at least 0": dict(window_right=-3),
    "softmax_scale ('big') must be a number": dict(softmax_scale="big"),
    "softmax_scale (nan) must be finite": dict(softmax_scale=float("nan")),
    "softcap (-1) must be 0 (no softcap) to 1e30": dict(softcap=-1.0),
    "dropout (1.5) must be at least 0 and less than 1": dict(dropout_p=1.5, seed=0),
    "dropout_p (0.1) needs a seed with ndarray arrays": dict(dropout_p=0.1),
    "seed (-1) must be a whole number from 0 to 2^64 - 1": dict(dropout_p=0.1, seed=-1),
    "layout ('hsbd') must be 'bshd' or 'bhsd'": dict(layout="hsbd"),
    "backend 'warp' is unknown; name one of": dict(backend="warp"),
    "backend 'a?b?c' is unknown; name one of": dict(backend="a\nb\0c"),
    "deterministic ('no') must be True or False": dict(deterministic="no"),
    "sink has no dimensions": dict(sink=np.float32(1.0)[...]),
    "bias is a float, which is no array": dict(bias=1.0),
    "kv_lengths is a list, which is no array: give one that speaks DLPack": dict(kv_lengths=[1, 7]),
    "bias is a float32, which is no array": dict(bias=np.float32(1.0)),  # a framework's, but a number
    "bias cannot be read by DLPack: DLPack only supports native byte order": dict(bias=np.ones((5, 7), ">f4")),
    "mask is fp32": dict(mask=np.ones((5, 7), np.float32)),
    "mask has the shape [1, 1, 3, 7] but must have [1, 1, 5, 7]": dict(mask=np.ones((3, 7), bool)),
    "kv_lengths is int64, which Fovea does not read": dict(kv_lengths=np.array([1, 2])),
    "kv_lengths[1] (9) must be at most seqlen_kv (7)": dict(kv_lengths=np.array([1, 9], np.int32)),
    "mask has 5 dimensions; Fovea takes at most 4": dict(mask=np.ones((1, 1, 1, 5, 7), bool)),
    "cu_seqlens_q and cu_seqlens_kv must be given together": dict(cu_seqlens_q=np.array([0, 5], np.int32)),
    "max_seqlen_q (5) belongs to packed sequences; give cu_seqlens_q": dict(max_seqlen_q=5),
    "max_seqlen_kv (7) belongs to packed sequences": dict(max_seqlen_kv=7, kv_lengths=np.array([1, 7], np.int32)),
    "a MaskedArray has a mask that Fovea does not read": dict(bias=np.ma.masked_array(np.ones((5, 7), np.float32))),
    "a MaskedArray has a mask that": dict(softmax_scale=np.ma.masked_array(0.5, True)),
    "out has the shape [2, 5, 4, 8] but must have [2, 5, 4, 6]": dict(out=np.empty((2, 5, 4, 8), np.float32)),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_a_refusal_is_one_sentence_with_the_value(sentence):
    with pytest.raises(ValueError) as refusal:
        fovea.attention(q, k, v, **REFUSED[sentence])
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name, right, wrong", [("window_left", 3, 3.0), ("softcap", 0, False), ("deterministic", True, 1)]
)
def test_a_value_of_another_type_is_refused_also_where_an_equal_one_was_taken_before(name, right, wrong):
    fovea.attention(q, k, v, **{name: right})
    with pytest.raises(ValueError, match=rf"{name} \({wrong}\) must be"):
        fovea.attention(q, k, v, **{name: wrong})


@pytest.mark.parametrize(
    "sentence, bad",
    {
        "q is fp64, which Fovea does not read": (q.astype(np.float64), k, v),
        "num_q_heads (4) must be a multiple of num_kv_heads (3)": (
            q,
            k.repeat(3, 2)[:, :, :3],
            v.repeat(3, 2)[:, :, :3],
        ),
        "batch differs: 2 in q and 1 in k": (q, k[:1], v[:1]),
        "a MaskedArray has a mask that Fovea does not read; give its data": (np.ma.masked_less(q, 0.0), k, v),
        "q is a list, which is no array": (q.tolist(), k, v),
        "q is a NoneType, which is no array": (None, k, v),
        "k is missing": (q, None, v),
        "q has no dimensions": (np.array(1.0, np.float32), k, v),
        "q cannot be read by DLPack: DLPack only supports native byte order": (q.astype(">f4"), k, v),
        "v cannot be read by DLPack": (q, k, v.astype(object)),
        "k wants gradients, but q is a ndarray": (q, torch.from_numpy(k.copy()).requires_grad_(), v),
        "q has 3 dimensions but must be [batch, seqlen_q, num_q_heads, head_dim]": (q[0], k, v),
        "q, k and v must share one dtype, but are fp32, fp16 and fp32": (q, k.astype(np.float16), v),
        "q's last dimension": (np.ascontiguousarray(q.swapaxes(2, 3)).swapaxes(2, 3), k, v),
    }.items(),
)
def test_bad_tensors_are_refused(sentence, bad):
    with pytest.raises(ValueError) as refusal:
        fovea.attention(*bad)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_masked_array_is_refused_beside_tensors_too(autocast):
    given = [torch.from_numpy(x) for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(ValueError, match="^a MaskedArray"):
        fovea.attention(*given, mask=np.ma.masked_array(np.ones((5, 7), bool), True))


def test_tensors_without_gradients_may_stand_beside_arrays():
    leaf = torch.from_numpy(k.copy()).requires_grad_()
    with torch.no_grad():
        np.testing.assert_array_equal(fovea.attention(q, leaf, v), fovea.attention(q, k, v))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_report_may_be_copied_and_pickled(copied):
    q, k, v = arrays()
    ends = np.array([0, 2, 5], np.int32)
    for report in (
        fovea.explain(q, k, v, causal="bottom_right"),
        fovea.explain(q, k, v, backward=True, backend="cpu_portable"),
        fovea.explain(q[0], k[0, :5], v[0, :5], cu_seqlens_q=ends, cu_seqlens_kv=ends),  # whose lengths stay open
    ):
        other = copied(report)
        assert type(other) is fovea.Report and (str(other), repr(other)) == (str(report), repr(report))
        for name in ("problem", "device", "backend", "details", "workspace_bytes", "reasons"):
            assert getattr(other, name) == getattr(report, name)


def test_a_mask_of_packed_sequences_is_as_long_as_the_longest_length_given():
    random = np.random.default_rng(5)
    q, k, v = (random.standard_normal((9, 2, 8), np.float32) for _ in range(3))
    ends, mask = np.array([0, 4, 9], np.int32), random.random((9, 9)) > 0.3

    def attend(size, longest):
        given = dict(cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest)
        return fovea.attention(q, k, v, mask=mask[:size, :size], causal="bottom_right", **given)

    expected = attend(5, None)
    for size, longest in ((5, 5), (8, 8), (9, 9), (9, 100)):  # as on a GPU, where nobody reads the ends
        np.testing.assert_allclose(attend(size, longest), expected, rtol=1e-5, atol=1e-6)
    for size, longest, wanted in ((5, 8, 8), (8, None, 5), (5, 100, 9)):
        with pytest.raises(ValueError, match=rf"^mask has the shape .* but must have \[1, 1, {wanted}, {wanted}\]$"):
            attend(size, longest)
    with pytest.raises(
        ValueError, match=r"^max_seqlen_q \(4\) is less than the longest sequence of cu_seqlens_q \(5\)$"
    ):
        attend(4, 4)


def test_explain_takes_the_arguments_of_attention():
    named = inspect.signature(fovea.explain).parameters
    assert set(named) == {*inspect.signature(fovea.attention).parameters, "backward"}
    everything = {name: parameter.default for name, parameter in named.items() if name not in ("q", "k", "v")}
    everything |= dict(dropout_p=0.1, seed=3, offset=4, return_lse=True, out=np.empty((2, 5, 4, 6), np.float32))
    assert fovea.explain(q, k, v, **everything).problem == "fwd fp32 b2 hq4 hkv2 sq5 skv7 d8 dv6 dropout=0.1"


def test_a_read_only_out_is_refused():
    out = np.empty((2, 5, 4, 6), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        fovea.attention(q, k, v, out=out)


def test_what_no_backend_runs_is_a_runtime_error_with_reasons():
    with pytest.raises(RuntimeError, match="no backend runs .* on cpu: .*NVIDIA GPUs only"):
        fovea.attention(q, k, v, backend="cuda_portable")
