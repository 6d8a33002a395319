"""flash_attn's functions: their forms agree with each other and with the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fovea import flash_attn

LENGTHS = (5, 12, 1, 9)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(9)


def formula(q, k, v, causal=False, window=(-1, -1), softcap=0.0, slopes=None):
    """One sequence, [seqlen, heads, dim], in double precision."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * distance.abs()
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= -distance > right
    scores = scores.masked_fill(hidden, -torch.inf)
    return torch.nan_to_num(scores.softmax(-1) @ v).transpose(0, 1).float(), scores.logsumexp(-1).float()


OPTIONS = [
    {},
    dict(causal=True),
    dict(window_size=(3, 2)),
    dict(causal=True, window_size=[4, -1]),
    dict(window_size=torch.tensor([-1, 2]), softcap=2.0),
    dict(causal=True, softcap=1.5),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", [(7, 7), (4, 9), (9, 4)])
def test_padded_calls_agree_with_the_formula(options, lengths):
    q, k, v = (torch.randn(2, n, h, 16) for n, h in zip((lengths[0], lengths[1], lengths[1]), (4, 2, 2)))
    slopes = torch.rand(4)
    out, lse, nothing = flash_attn.flash_attn_func(q, k, v, alibi_slopes=slopes, return_attn_probs=True, **options)
    assert nothing is None
    window = tuple(int(side) for side in options.get("window_size", (-1, -1)))
    for b in range(2):
        expected, expected_lse = formula(
            q[b], k[b], v[b], options.get("causal", False), window, options.get("softcap", 0.0), slopes
        )
        torch.testing.assert_close(out[b], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[b], expected_lse, rtol=1e-4, atol=1e-5)


def packed():
    cu_seqlens = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0).to(torch.int32)
    return torch.randn(int(cu_seqlens[-1]), 3, 4, 16), cu_seqlens, max(LENGTHS)


def test_packed_sequences_are_each_on_their_own():
    qkv, cu_seqlens, longest = packed()
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest, causal=True, window_size=(6, 0))
    for begin, end in zip(cu_seqlens[:-1], cu_seqlens[1:]):
        alone = flash_attn.flash_attn_qkvpacked_func(qkv[None, begin:end], causal=True, window_size=(6, 0))
        torch.testing.assert_close(out[begin:end], alone[0])


def test_all_forms_of_one_call_give_the_same_out_and_gradients():
    qkv, cu_seqlens, longest = packed()
    weight = torch.randn(len(qkv), 4, 16)

    def run(attend):
        leaf = qkv.clone().requires_grad_()
        out = attend(leaf)
        return out, *torch.autograd.grad((out * weight).sum(), leaf)

    options = dict(causal=True, softcap=3.0, softmax_scale=0.2)
    lengths = (cu_seqlens, cu_seqlens, longest, longest)
    one = run(lambda x: flash_attn.flash_attn_varlen_qkvpacked_func(x, cu_seqlens, longest, **options))
    two = run(lambda x: flash_attn.flash_attn_varlen_kvpacked_func(x[:, 0], x[:, 1:], *lengths, **options))
    three = run(lambda x: flash_attn.flash_attn_varlen_func(*x.unbind(1), *lengths, **options))
    for a, b, c in zip(one, two, three):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_dense_packed_and_varlen_drop_the_same_entries():
    batch, seqlen = 3, 10
    qkv = torch.randn(batch, seqlen, 3, 4, 16)
    cu_seqlens = torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32)
    forms = (
        lambda: flash_attn.flash_attn_func(*qkv.unbind(2), dropout_p=0.3),
        lambda: flash_attn.flash_attn_qkvpacked_func(qkv, 0.3),
        lambda: flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], 0.3),
        lambda: flash_attn.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), cu_seqlens, seqlen, 0.3),
    )
    outs = []
    for form in forms:
        torch.manual_seed(77)
        outs.append(form().reshape(batch, seqlen, 4, 16))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [tuple, list])
def test_a_compiled_call_takes_windows_that_change(make):
    torch._dynamo.reset()
    q = torch.randn(2, 9, 4, 16)
    seen = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda window: flash_attn.flash_attn_func(q, q, q, window_size=window), fullgraph=True, backend=seen
    )
    for window in ((3, 2), (4, 2), (5, 4), (6, 6), (2, 7), (8, 3), (7, 5)):
        assert torch.equal(compiled(make(window)), flash_attn.flash_attn_func(q, q, q, window_size=window))
    assert seen.frame_count <= 3  # once, and once for each side that turns out to change
    for window in ((-1, 3), (0, 1), (-1, -1)):
        assert torch.equal(compiled(make(window)), flash_attn.flash_attn_func(q, q, q, window_size=window))


def test_refusals():
    q = torch.randn(2, 5, 4, 16)
    with pytest.raises(ValueError, match=r"qkv has the shape \[2, 5, 4, 16\] but must be \[batch, seqlen, 3"):
        flash_attn.flash_attn_qkvpacked_func(q)
    for window in ((1, 2, 3), (1,), (1.5, 2), (None, 1), "ab", 3, None):
        with pytest.raises(ValueError, match="window_size .* must be .left, right., two whole numbers"):
            flash_attn.flash_attn_func(q, q, q, window_size=window)
    for causal in ("top_left", "False", 2, 1.0, None):
        with pytest.raises(TypeError, match="causal .* must be True or False"):
            flash_attn.flash_attn_func(q, q, q, causal=causal)
    lower = flash_attn.flash_attn_func(q, q, q, causal=True)
    assert all(flash_attn.flash_attn_func(q, q, q, causal=causal).equal(lower) for causal in (1, np.True_))
    with pytest.raises(ValueError, match="k is a ndarray, which is no PyTorch tensor"):
        flash_attn.flash_attn_func(q, q.numpy(), q)
    with pytest.raises(ValueError, match="qkv is a ndarray, which is no PyTorch tensor"):
        flash_attn.flash_attn_qkvpacked_func(q.numpy())
    with pytest.raises(NotImplementedError, match="block_table"):
        flash_attn.flash_attn_varlen_func(q[0], q[0], q[0], None, None, 5, 5, block_table=torch.zeros(1))
    with pytest.raises(ValueError, match="num_q_heads"):
        flash_attn.flash_attn_func(q, q[:, :, :3], q[:, :, :3])
