"""Random problems out of the whole option space, each option with every other, judged by the error rule through the
Python package: eager, and compiled with torch.compile(fullgraph=True)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

import fovea
from judge import GRADIENTS, Judged

COUNT = 300
TENSOR_OPTIONS = (
    "mask", "bias", "alibi_slopes", "sink", "q_lengths", "kv_lengths", "cu_seqlens_q", "cu_seqlens_kv",
)  # fmt: skip


def solve(judged: Judged, attention: Callable[..., Any], heads_first: bool) -> dict[str, torch.Tensor]:
    """out, lse and every gradient that the problem wants, through the package."""
    tensors = dict(judged.inputs)
    for name in GRADIENTS.values():
        if judged.backward and name in tensors:
            tensors[name] = tensors[name].detach().requires_grad_()
    seen = {name: turned(tensors[name], heads_first) for name in ("q", "k", "v")}
    options = judged.options() | {name: tensors[name] for name in TENSOR_OPTIONS if name in tensors}
    if "cu_seqlens_q" in tensors:
        for side in ("q", "kv"):
            options[f"max_seqlen_{side}"] = int(tensors[f"cu_seqlens_{side}"].diff().max())
    out, lse = attention(**seen, **options, layout="bhsd" if heads_first else "bshd", return_lse=True)
    results = {"out": turned(out, heads_first), "lse": lse}
    if judged.backward:
        incoming = [(results["out"], tensors["dout"])] + ([(lse, tensors["dlse"])] if "dlse" in tensors else [])
        wanted = [name for name in GRADIENTS if name in judged.wanted]
        leaves = [tensors[GRADIENTS[name]] for name in wanted]
        outputs, gradients = zip(*incoming)
        results |= dict(zip(wanted, torch.autograd.grad(outputs, leaves, gradients)))
    return {name: result for name, result in results.items() if name in judged.wanted}


def turned(tensor: torch.Tensor, heads_first: bool) -> torch.Tensor:
    return tensor.transpose(1, 2) if heads_first else tensor


def eager(**arguments: Any) -> Any:
    return fovea.attention(**arguments)


def compiled(**arguments: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=False)(**arguments)


def test_random_problems_keep_the_error_rule() -> None:
    failures = []
    for seed in range(COUNT):
        judged = Judged(seed)
        heads_first = seed % 2 == 1 and "cu_seqlens_q" not in judged.inputs
        for attention in (eager, compiled):
            faults = judged.failures(solve(judged, attention, heads_first))
            failures += [f"{attention.__name__}: {fault}" for fault in faults]
        if seed == 0:
            gc.freeze()  # what the first graph has imported stays: no graph need search it for garbage
    assert not failures, "\n".join(failures)
