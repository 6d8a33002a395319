"""Random problems out of the whole option space, each option with every other, judged by the error rule through the
Python package: eager, and compiled with torch.compile(fullgraph=True)."""

from __future__ import annotations

import gc
from typing import Any

import torch

import fovea
from judge import GRADIENTS, Judged

COUNT = 300
TOGETHER = 5  # calls of one graph: torch.compile takes longer than all else
TENSOR_OPTIONS = (
    "mask", "bias", "alibi_slopes", "sink", "q_lengths", "kv_lengths", "cu_seqlens_q", "cu_seqlens_kv",
)  # fmt: skip


class Call:
    """A problem as a call of fovea.attention, every second one with the heads before the rows."""

    def __init__(self, seed: int) -> None:
        self.judged = judged = Judged(seed)
        self.tensors = tensors = dict(judged.inputs)
        self.heads_first = seed % 2 == 1 and "cu_seqlens_q" not in tensors
        for name in GRADIENTS.values():
            if judged.backward and name in tensors:
                tensors[name] = tensors[name].detach().requires_grad_()
        self.arguments: dict[str, Any] = {name: self.turned(tensors[name]) for name in ("q", "k", "v")}
        self.arguments |= judged.options() | {name: tensors[name] for name in TENSOR_OPTIONS if name in tensors}
        if "cu_seqlens_q" in tensors:
            for side in ("q", "kv"):
                self.arguments[f"max_seqlen_{side}"] = int(tensors[f"cu_seqlens_{side}"].diff().max())
        self.arguments |= {"layout": "bhsd" if self.heads_first else "bshd", "return_lse": True}

    def leaves(self) -> dict[str, torch.Tensor]:
        """By the gradient's name, what the problem wants gradients of."""
        wanted = self.judged.wanted if self.judged.backward else ()
        return {gradient: self.tensors[name] for gradient, name in GRADIENTS.items() if gradient in wanted}

    def incoming(self, out: torch.Tensor, lse: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Results with the gradients that come in, where the problem wants others."""
        given = [(self.turned(out), "dout"), (lse, "dlse")] if self.leaves() else []
        return [(result, self.tensors[name]) for result, name in given if name in self.tensors]

    def failures(self, out: torch.Tensor, lse: torch.Tensor, gradients: dict[str, torch.Tensor]) -> list[str]:
        results = {"out": self.turned(out), "lse": lse, **gradients}
        return self.judged.failures({name: result for name, result in results.items() if name in self.judged.wanted})

    def turned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2) if self.heads_first else tensor


def eager(calls: list[dict[str, Any]]) -> list[Any]:
    return [fovea.attention(**arguments) for arguments in calls]


def compiled(calls: list[dict[str, Any]]) -> list[Any]:
    torch._dynamo.reset()
    return torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=False)(calls)


def differentiated(calls: list[Call], results: list[Any]) -> list[dict[str, torch.Tensor]]:
    """The gradients of each call, all in one pass, as of a compiled graph."""
    outputs, incoming = zip(*[pair for call, of in zip(calls, results) for pair in call.incoming(*of)])
    leaves = [leaf for call in calls for leaf in call.leaves().values()]
    gradients = iter(torch.autograd.grad(outputs, leaves, incoming))
    return [{name: next(gradients) for name in call.leaves()} for call in calls]


def test_random_problems_keep_the_error_rule() -> None:
    failures = []
    for first in range(0, COUNT, TOGETHER):
        calls = [Call(seed) for seed in range(first, first + TOGETHER)]
        for attend in (eager, compiled):
            results = attend([call.arguments for call in calls])
            for call, of, gradients in zip(calls, results, differentiated(calls, results)):
                failures += [f"{attend.__name__}: {fault}" for fault in call.failures(*of, gradients)]
        if first == 0:
            gc.freeze()  # what the first graph has imported stays: no graph need search it for garbage
    assert not failures, "\n".join(failures)
