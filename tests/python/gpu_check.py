#!/usr/bin/env python3
"""What only a GPU can show of the Python package: run on a machine with one, with PyTorch and the wheel installed.

    python3 gpu_check.py                      # everything; exit code 1 where a check failed
    python3 gpu_check.py --json FILE          # and the table of python -m fovea.bench as JSON
    python3 gpu_check.py --no-bench --gpt ../../examples/python/train_gpt.py

Needs nothing else of the repository.  Results are held against the oracle (backend "reference") on the CPU, and may be
off by twice what PyTorch's N×N formula is off by in the same dtype on the same GPU.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fovea
import fovea._core
import fovea.nn
import fovea.torch
from fovea import flash_attn

GPU = torch.device("cuda")
CHECKS: list[Callable[[], Any]] = []
#: Of the largest element: below this an error is nobody's fault.  Sums of hundreds of fp32 products round that much.
FLOOR = {torch.float32: 2.0**-19, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    CHECKS.append(function)
    return function


def same(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y), f"differs by {(x.float() - y.float()).abs().max().item():.3g}"


def largest(errors: list[float]) -> float:
    """NaN where one is NaN, which Python's max would pass over."""
    return torch.tensor(errors).max().item()


def tensors(
    batch: int = 2, seqlen_q: int = 130, seqlen_kv: int = 190, heads: int = 4, kv_heads: int = 2, dim: int = 64,
    dtype: torch.dtype = torch.bfloat16, grad: bool = True,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    shapes = ((batch, seqlen_q, heads, dim), (batch, seqlen_kv, kv_heads, dim), (batch, seqlen_kv, kv_heads, dim))
    return tuple(torch.randn(shape, device=GPU, dtype=dtype).requires_grad_(grad) for shape in shapes)


def formula(q: Any, k: Any, v: Any, causal: Any = None, window_left: Any = None, window_right: Any = None,
            mask: Any = None, bias: Any = None, alibi_slopes: Any = None, sink: Any = None, softcap: float = 0.0,
            kv_lengths: Any = None, **_: Any) -> torch.Tensor:  # fmt: skip
    """[batch, seqlen, heads, dim] in the tensors' own dtype, with whole matrices."""
    dtype = q.dtype
    group = q.shape[2] // k.shape[2]
    q, k, v = (
        q.transpose(1, 2),
        k.transpose(1, 2).repeat_interleave(group, 1),
        v.transpose(1, 2).repeat_interleave(group, 1),
    )
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    length = torch.full((len(q),), k.shape[2], device=q.device) if kv_lengths is None else kv_lengths
    offset = 0 if causal == "top_left" else (length - q.shape[2])[:, None, None, None]
    column = torch.arange(k.shape[2], device=q.device)
    distance = torch.arange(q.shape[2], device=q.device)[:, None] + offset - column
    if alibi_slopes is not None:
        scores = scores - (alibi_slopes.view(-1, q.shape[1])[:, :, None, None] * distance.abs()).to(dtype)
    if bias is not None:
        scores = scores + bias.to(dtype)
    visible = (column < length[:, None])[:, None, None] & torch.ones_like(distance, dtype=torch.bool)
    if causal is not None:
        visible = visible & (distance >= 0)
    if window_left is not None:
        visible = visible & (distance <= window_left)
    if window_right is not None:
        visible = visible & (-distance <= window_right)
    if mask is not None:
        visible = visible & mask
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.float().softmax(-1).to(dtype)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)


def random_options(seed: int, heads: int, rows: int, keys: int, dtype: torch.dtype) -> dict[str, Any]:
    """Options that compose; row 0 always sees a key."""
    chance = torch.Generator().manual_seed(seed)

    def coin() -> bool:
        return bool(torch.rand((), generator=chance) < 0.4)

    options: dict[str, Any] = {}
    if coin():
        options["causal"] = "top_left" if coin() else "bottom_right"
    if coin():
        options["window_left"] = 40
    if coin():
        mask = torch.rand(2, 1, rows, keys, device=GPU) > 0.3
        options["mask"] = mask
    if coin():
        kind = torch.float32 if coin() else dtype
        options["bias"] = torch.randn(1, heads, rows, keys, device=GPU, dtype=kind).requires_grad_()
    if coin():
        options["alibi_slopes"] = torch.rand(heads, device=GPU).mul_(0.1).requires_grad_()
    if coin():
        options["sink"] = torch.randn(heads, device=GPU).requires_grad_()
    if coin():
        options["softcap"] = 5.0
    if coin():
        options["kv_lengths"] = torch.tensor([keys, keys - 37], device=GPU, dtype=torch.int32)
    return options


def gradients_of(
    call: Callable[..., Any], given: tuple[Any, ...], options: dict[str, Any], dout: Any
) -> list[torch.Tensor]:
    out = call(*given, **options)
    leaves = [*given, *(x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad)]
    return [out, *torch.autograd.grad(out, leaves, dout.to(out.device))]


def taken_to_cpu(value: Any) -> Any:
    return value.detach().cpu().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def composed(seed: int) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]:
    """q, k and v, options and the gradient of the result."""
    torch.manual_seed(seed)
    dtype = (torch.bfloat16, torch.float16, torch.float32)[seed % 3]
    dim, rows, keys = (32, 64, 96, 128)[seed % 4], (130, 64, 33)[seed % 3], (190, 257)[seed % 2]
    given = tensors(2, rows, keys, 4, (4, 2, 1)[seed % 3], dim, dtype)
    return given, random_options(seed, 4, rows, keys, dtype), torch.randn_like(given[0])


@check
def random_composed_problems_are_as_right_as_the_formula() -> str:
    problems = [composed(seed) for seed in range(60)]
    with ThreadPoolExecutor() as pool:  # compiles all kernels, several at once
        list(pool.map(lambda x: [fovea.explain(*x[0], **x[1], backward=pass_) for pass_ in (False, True)], problems))
    ratios = []
    for seed, (given, options, dout) in enumerate(problems):
        dtype = given[0].dtype
        ours = gradients_of(fovea.attention, given, options, dout)
        plain = gradients_of(formula, given, options, dout)
        on_cpu = {name: taken_to_cpu(value) for name, value in options.items()} | {"backend": "reference"}
        exact = gradients_of(fovea.attention, tuple(taken_to_cpu(x) for x in given), on_cpu, dout)
        for name, x, y, z in zip(("out", "dq", "dk", "dv", "d1", "d2", "d3"), ours, plain, exact):
            assert x.shape == z.shape and x.dtype == z.dtype and x.isfinite().all(), (seed, name)
            x, y, z = x.cpu().double(), y.cpu().double(), z.double()
            peer = torch.nan_to_num(y - z, nan=0.0).abs().max().item()
            ratio = (x - z).abs().max().item() / max(peer, FLOOR[dtype] * z.abs().max().item(), 1e-30)
            ratios.append(ratio)
            assert ratio <= 2, (
                f"seed {seed} {dtype} {sorted(options)}: {name} has {ratio:.2f} times the formula's error"
            )
    return f"60 problems, at most {largest(ratios):.2f} times the formula's error"


@check
def the_operators_run_and_a_gpu_is_named() -> str:
    q, k, v = tensors(grad=False)
    report = fovea.explain(q, k, v, causal="bottom_right")
    assert report.device == "cuda:0" and report.backend.startswith("cuda_"), str(report)
    return f"{report.backend}: {dict(report.details).get('kernel', '')}"


@check
def dropout_drops_what_the_cpu_drops() -> None:
    q, k = (torch.randn(1, 96, 2, 64, device=GPU) for _ in range(2))
    v = torch.eye(96, device=GPU)[None, :, None].expand(1, 96, 2, 96)
    kept = fovea.attention(q, k, v, dropout_p=0.3, seed=77, offset=5) != 0
    assert torch.equal(kept.cpu(), fovea.attention(q.cpu(), k.cpu(), v.cpu(), dropout_p=0.3, seed=77, offset=5) != 0)


@check
def seeds_follow_the_gpu_s_generator_and_wait_for_nothing() -> None:
    q, k, v = tensors()
    fovea.attention(q, k, v, dropout_p=0.3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        state = torch.cuda.get_rng_state()
        first, second = (fovea.attention(q, k, v, dropout_p=0.3) for _ in range(2))
        torch.cuda.set_rng_state(state)
        again = fovea.attention(q, k, v, dropout_p=0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again) and not torch.equal(first, second)
    torch.cuda.manual_seed(3)
    third = fovea.attention(q, k, v, dropout_p=0.3)
    torch.cuda.manual_seed(3)
    assert torch.equal(third, fovea.attention(q, k, v, dropout_p=0.3))


@check
def checkpoints_recompute_the_same_dropout() -> None:
    q, k, v = tensors()

    def work(q: Any, k: Any, v: Any) -> Any:
        return fovea.attention(q, k, v, dropout_p=0.5, deterministic=True).square()

    torch.manual_seed(3)
    plain = work(q, k, v)
    expected = torch.autograd.grad(plain.sum(), (q, k, v))
    torch.manual_seed(3)
    out = checkpoint(work, q, k, v, use_reentrant=False)
    same((out, *torch.autograd.grad(out.sum(), (q, k, v))), (plain, *expected))


@check
def work_is_queued_in_the_current_stream() -> None:
    q, k, v = tensors(grad=False)
    expected = fovea.attention(q * 2, k, v)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # what came in a wrong stream would run ahead of this
            late = q * 2
            out = fovea.attention(late, k, v)
        side.synchronize()
        assert torch.equal(out, expected)
        del late, out


@check
def numbers_on_another_device_are_refused() -> None:
    q, k, v = tensors(grad=False)
    try:
        fovea.attention(q, k.cpu(), v)
    except ValueError as error:
        assert "k is on cpu" in str(error) or "cpu" in str(error), error
    else:
        raise AssertionError("mixed devices were taken")


def compiled_pair(**options: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch._dynamo.reset()
    q, k, v = tensors()
    bias = torch.randn(1, 4, 130, 190, device=GPU).requires_grad_()

    def work(q: Any, k: Any, v: Any, bias: Any) -> Any:
        out, lse = fovea.attention(
            torch.sin(q), k, v, bias=bias, causal="bottom_right", return_lse=True, deterministic=True
        )
        return out.float().square().sum() + lse.where(lse.isfinite(), 0).sum()

    results = []
    for call in (work, torch.compile(work, fullgraph=True, **options)):
        for _ in range(4):  # the first calls warm up, later ones replay
            loss = call(q, k, v, bias)
            gradients = torch.autograd.grad(loss, (q, k, v, bias))
        results.append([x.clone() for x in (loss, *gradients)])
    return results[0], results[1]


@check
def compiled_without_graph_breaks() -> None:
    for ours, theirs in zip(*compiled_pair(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@check
def compiled_into_cuda_graphs() -> None:
    for ours, theirs in zip(*compiled_pair(mode="reduce-overhead"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@check
def captured_in_a_cuda_graph_forward_and_backward() -> None:
    q, k, v = tensors()
    mask = torch.rand(130, 190, device=GPU) > 0.2

    def step() -> list[torch.Tensor]:
        out = fovea.attention(q, k, v, causal="bottom_right", mask=mask, deterministic=True)
        return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for tensor in (q, k, v):
                tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        torch.cuda.synchronize()
        same(captured, step())


@check
def dropout_in_a_capture_is_refused_in_a_sentence() -> None:
    q, k, v = tensors(grad=False)
    fovea.attention(q, k, v, dropout_p=0.1, seed=1)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            fovea.attention(q, k, v, dropout_p=0.1)
    except RuntimeError as error:
        assert "drop the same entries in every replay" in str(error), error
    else:
        raise AssertionError("dropout was captured without a seed")


@check
def exported_and_run() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return fovea.attention(q, k, v, causal="top_left", window_left=30)

    q, k, v = tensors(grad=False)
    program = torch.export.export(Layer(), (q, k, v))
    same([program.module()(q, k, v)], [Layer()(q, k, v)])


@check
def sdpa_and_flash_attn_agree_with_pytorch() -> None:
    q, k, v = (torch.randn(2, 4, 200, 64, device=GPU, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.rand(2, 1, 1, 200, device=GPU) > 0.2
    for options in ({}, dict(is_causal=True), dict(attn_mask=mask)):
        ours = fovea.torch.scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, **options), rtol=2e-2, atol=2e-2)
    ends = torch.arange(0, 401, 200, device=GPU, dtype=torch.int32)
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    packed = flash_attn.flash_attn_varlen_func(*rows, ends, ends, 200, 200, causal=True)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(packed, dense, rtol=2e-2, atol=2e-2)


@check
def nested_tensors_forward_and_backward() -> None:
    lengths = (30, 128, 7)
    parts = [torch.randn(n, 4, 64, device=GPU, dtype=torch.bfloat16) for n in lengths]
    ragged = torch.nested.nested_tensor(parts, layout=torch.jagged).requires_grad_()
    out = fovea.attention(ragged, ragged, ragged, causal="bottom_right")
    for piece, part in zip(out.unbind(), parts):
        alone = fovea.attention(part[None], part[None], part[None], causal="bottom_right")[0]
        torch.testing.assert_close(piece, alone, rtol=1e-2, atol=1e-2)
    (gradient,) = torch.autograd.grad(out.values().float().square().sum(), ragged)
    assert gradient.is_nested and gradient.values().isfinite().all()


@check
def replace_sdpa_and_autocast_under_a_module() -> str:
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, device=GPU)
    x, padding = (
        torch.randn(3, 50, 64, device=GPU),
        torch.arange(50, device=GPU) >= torch.tensor([[50], [31], [9]], device=GPU),
    )
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = layer(x, src_key_padding_mask=padding)
        with fovea.torch.replace_sdpa() as report:
            out = layer(x, src_key_padding_mask=padding)
            out.float().sum().backward()
    torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2)
    assert report.replaced.total() == 1 and report.left.total() == 0, str(report)
    return str(report).splitlines()[1].strip()


@check
def layers_of_torch_nn_keep_the_error_rule() -> str:
    lengths = torch.tensor([[90], [31], [140]], device=GPU)
    paddings = (None, torch.arange(140, device=GPU) >= lengths, torch.rand(3, 140, device=GPU) < 0.3)
    masks = (None, torch.ones(140, 140, dtype=torch.bool, device=GPU).triu(1), torch.rand(140, 140, device=GPU) < 0.3)
    masks[2].fill_diagonal_(False)
    ratios, cases = [], 0
    for padding, mask, batch_first in itertools.product(paddings, masks, (True, False)):
        if padding is not None:
            padding[:, 0] = False  # torch gives NaN where nothing is seen
        if mask is not None:
            mask[:, 0] = False
        layer = torch.nn.TransformerEncoderLayer(64, 4, 96, 0.0, batch_first=batch_first)
        model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(GPU)
        x = torch.randn((3, 140, 64) if batch_first else (140, 3, 64), device=GPU)
        weight = torch.randn_like(x)
        results = []
        for each in (copy.deepcopy(model).double(), model, fovea.nn.convert(copy.deepcopy(model))):
            leaf = x.to(next(each.parameters()).dtype, copy=True).requires_grad_()
            out = each(leaf, mask=mask, src_key_padding_mask=padding)
            results.append((out, *torch.autograd.grad((out * weight).sum(), [leaf, *each.parameters()])))
        for exact, plain, ours in zip(*results, strict=True):
            floor = FLOOR[torch.float32] * exact.abs().max().item()
            limit = max(2 * (plain - exact).abs().max().item(), floor)
            ratios.append((ours - exact).abs().max().item() / limit)
        cases += 1
    worst = largest(ratios)
    assert worst <= 1.0, f"{2 * worst:.3g} times the plain layer's error"
    layer = fovea.nn.MultiheadAttention(64, 4, batch_first=True, device=GPU)
    assert layer.explain(x).torch_products == "the tensors are float32, not float16 or bfloat16"
    assert layer.bfloat16().explain(x.bfloat16()).torch_products == fovea._core.why_no_layer(0)
    return f"{cases} encoders, at most {2 * worst:.2f} times the plain layer's error"


@check
def layers_leave_padding_out_and_give_weights() -> None:
    layer = fovea.nn.TransformerEncoderLayer(64, 4, 96, 0.0, batch_first=True, device=GPU)
    x, padding = torch.randn(3, 140, 64, device=GPU), torch.rand(3, 140, device=GPU) < 0.4
    expected = layer(x, src_key_padding_mask=padding)
    layer.pack_padding = True
    out = layer(x, src_key_padding_mask=padding)
    assert out[padding].eq(0).all()
    torch.testing.assert_close(out[~padding], expected[~padding], rtol=1e-4, atol=1e-4)
    assert "packed=" in layer.explain(x, src_key_padding_mask=padding).forward.problem
    attention = layer.self_attn
    theirs = torch.nn.MultiheadAttention(64, 4, batch_first=True, device=GPU)
    theirs.load_state_dict(attention.state_dict())
    for one, other in zip(attention(x, x, x, padding), theirs(x, x, x, padding), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def attention_step(layer: Any, x: Any, memory: Any, options: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Output and all gradients of a weighted sum."""
    dtype = next(layer.parameters()).dtype
    leaves = [x.to(dtype, copy=True).requires_grad_()]
    if memory is not None:
        leaves.append(memory.to(dtype, copy=True).requires_grad_())
    out, _ = layer(leaves[0], leaves[-1], leaves[-1], need_weights=False, **options)
    read = options.get("key_padding_mask")
    read = None if read is None else ~(read if layer.batch_first else read.T)[..., None]
    weighted = out * torch.sin(torch.arange(out.numel(), device=GPU).view(out.shape)).to(dtype)
    weighted = weighted if read is None or memory is not None else weighted * read
    gradients = torch.autograd.grad(weighted.sum(), [*leaves, *layer.parameters()])
    return (out if read is None or memory is not None else out * read, *gradients)


def moved(layer: Any, x: Any, seed: int) -> tuple[Any, Any]:
    """A layer and its input with every number one unit roundoff up or down (D. S. Parker, 1997)."""
    chance = torch.Generator(GPU).manual_seed(seed)

    def move(number: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, number.shape, generator=chance, device=GPU) * 2 - 1
        return (number.double() * (1 + signs * torch.finfo(number.dtype).eps / 2)).to(number.dtype)

    other = copy.deepcopy(layer)
    other.load_state_dict({name: move(weight) for name, weight in layer.state_dict().items()})
    return other, None if x is None else move(x)


@check
def layers_at_once_keep_the_error_rule() -> str:
    lengths = torch.tensor([[90], [31], [140]], device=GPU)
    ragged = torch.arange(140, device=GPU) >= lengths
    holes = torch.rand(3, 140, device=GPU) < 0.3
    square = torch.rand(140, 140, device=GPU) < 0.3
    for mask in (holes, square):
        mask[:, 0] = False
    ratios, cases, others = [], 0, 0
    at_once = fovea._core.forward_layer

    def counted(*words: Any) -> Any:
        nonlocal others
        made = at_once(*words)
        others += made is None
        return made

    fovea._core.forward_layer = counted
    for dtype, batch_first, cross, padding, packs, mask, bias in itertools.product(
        (torch.bfloat16, torch.float16), (True, False), (True, False), (None, ragged, holes), (True, False),
        (None, square), (True, False),
    ):  # fmt: skip
        if packs and (cross or mask is not None or padding is None):
            continue
        layer = torch.nn.MultiheadAttention(64, 4, batch_first=batch_first, bias=bias, device=GPU).to(dtype)
        if bias:
            torch.nn.init.normal_(layer.in_proj_bias)
        shape = (3, 140, 64) if batch_first else (140, 3, 64)
        x, memory = torch.randn(shape, device=GPU), torch.randn(shape, device=GPU) if cross else None
        x = x.to(dtype)
        memory = None if memory is None else memory.to(dtype)
        options = {"key_padding_mask": padding, "attn_mask": mask}
        exact = attention_step(copy.deepcopy(layer).double(), x, memory, options)
        plain = [attention_step(layer, x, memory, options)]
        for seed in range(3):  # one sample of chance may be a lucky one
            other, given = moved(layer, x, seed)
            plain.append(attention_step(other, given, memory, options))
        ours = attention_step(fovea.nn.convert(copy.deepcopy(layer), pack_padding=packs), x, memory, options)
        for right, mine, *theirs in zip(exact, ours, *plain, strict=True):
            errors = [(each - right).abs().max().item() for each in theirs]
            limit = max(2 * max(errors), FLOOR[dtype] * right.abs().max().item())
            ratios.append((mine - right).abs().max().item() / limit)
        cases += 1
    worst = largest(ratios)
    fovea._core.forward_layer = at_once
    assert worst <= 1.0, f"{2 * worst:.3g} times the plain layer's error"
    assert others == 0, f"{others} of {cases} went another way"
    return f"{cases} layers, at most {2 * worst:.2f} times the plain layer's error"


def half_layer(dropout: float = 0.0) -> tuple[Any, ...]:
    layer = fovea.nn.MultiheadAttention(64, 4, dropout, batch_first=True, device=GPU, dtype=torch.bfloat16)
    x = torch.randn(3, 140, 64, device=GPU, dtype=torch.bfloat16)
    return layer, x, torch.rand(140, 140, device=GPU) < 0.3, torch.rand(3, 140, device=GPU) < 0.3


@check
def layers_give_gradients_to_whom_is_not_frozen() -> None:
    layer, x, mask, _ = half_layer()
    leaves = (x, *layer.parameters())
    whole: list[Any] = []
    for learns in itertools.product((True, False), repeat=5):
        if not any(learns):
            continue
        for leaf, learning in zip(leaves, learns, strict=True):
            leaf.grad = None
            leaf.requires_grad_(learning)
        layer(x, x, x, None, False, mask)[0].float().square().sum().backward()
        if all(learns):
            whole = [leaf.grad for leaf in leaves]
        for leaf, learning, gradient in zip(leaves, learns, whole, strict=True):
            assert (leaf.grad is not None) == learning
            if learning:
                torch.testing.assert_close(leaf.grad, gradient, rtol=2e-2, atol=2e-2 * gradient.abs().max().item())


@check
def layers_wait_for_nothing() -> None:
    layer, x, mask, padding = half_layer(0.1)

    def step() -> None:
        layer(x, x, x, padding, False, mask)[0].float().square().sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@check
def layers_are_captured_and_follow_the_current_stream() -> None:
    layer, x, mask, _ = half_layer()

    def step() -> list[torch.Tensor]:
        out, _ = layer(x, x, x, None, False, mask)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), list(layer.parameters()))]

    expected = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late = step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for one, two, three in zip(expected, late, captured, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(one, three, rtol=2e-2, atol=2e-2)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured[0], step()[0])


@check
def host_time_of_a_forward_is_at_most_25_us() -> str:
    from fovea.bench import Bench

    least = Bench(GPU, 1, 1, 16, 64, 3).overhead(rounds=7, calls=200)
    text = ", ".join(f"{name} {us:.1f} µs" for name, us in least.items())
    assert max(us for name, us in least.items() if name.startswith("fovea")) <= 25, text
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="where python -m fovea.bench writes its results")
    parser.add_argument("--no-bench", action="store_true", help="leave the tables and the mini-test out")
    parser.add_argument("--gpt", metavar="train_gpt.py", help="also train the small GPT of examples/python on the GPU")
    parser.add_argument("--only", metavar="WORD", default="", help="checks whose name has the word")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Fovea {fovea.__version__}", flush=True)
    failed = 0
    for function in CHECKS:
        name = function.__name__.replace("_", " ")
        if options.only not in name:
            continue
        torch.manual_seed(1)
        try:
            said = function()
            torch.cuda.synchronize()
        except Exception:
            failed += 1
            print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
        else:
            print(f"ok      {name}{f': {said}' if said else ''}", flush=True)
    if not options.no_bench:
        failed += subprocess.run([sys.executable, "-W", "ignore", "-m", "fovea.bench", "--device", "cuda"]
                                 + (["--json", options.json] if options.json else [])).returncode != 0  # fmt: skip
        failed += (
            subprocess.run([sys.executable, "-W", "ignore", "-m", "fovea.minitest", "--device", "cuda"]).returncode != 0
        )
    if options.gpt:
        picture = os.path.join(tempfile.gettempdir(), "loss-cuda.svg")
        failed += subprocess.run([sys.executable, options.gpt, "--device", "cuda", "--plot", picture]).returncode != 0
    print(f"{len(CHECKS)} checks, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
