"""python -m fovea.bench: PyTorch's scaled_dot_product_attention and Fovea side by side, and which kernel each ran.

One run, one process, the same tensors: medians of forward and backward, memory beyond the tensors of the call, how far
the results are apart, and what a small call costs on the host.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

import fovea
from fovea._observe import count_option, device_name, device_option, file_option, print_everywhere, torch_kernel


@dataclass
class Measured:
    """One side of one case; numbers are None where it was refused."""

    kernel: str
    forward_ms: float | None = None
    backward_ms: float | None = None
    forward_mib: float | None = None
    training_mib: float | None = None
    refused: str | None = None


@dataclass
class Row:
    """One case, both sides."""

    case: str
    dtype: str
    torch: Measured
    fovea: Measured
    difference: float | None = None


@dataclass
class Case:
    """What is asked of both: PyTorch's arguments, Fovea's, and changes to sizes."""

    name: str
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    dim: int | None = None
    ragged: bool = False


class Bench:
    """The cases on one device."""

    def __init__(self, device: torch.device, batch: int, heads: int, seqlen: int, dim: int, repeats: int) -> None:
        self.device, self.batch, self.heads, self.seqlen, self.dim = device, batch, heads, seqlen, dim
        self.repeats = repeats
        self.on_gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.lengths = torch.linspace(seqlen // 4, seqlen, batch).int().to(device)

    def cases(self) -> list[Case]:
        """Where PyTorch's fused attention is at home, and the options at which it stops, one after the other."""
        square = (self.seqlen, self.seqlen)
        mask = torch.rand(square, device=self.device) > 0.25
        mask.fill_diagonal_(True)
        padding = torch.arange(self.seqlen, device=self.device) < self.lengths[:, None]
        padding = padding[:, None, None]
        bias = torch.randn(1, self.heads, *square, device=self.device, dtype=self.dtype, requires_grad=True)
        other = torch.float32 if self.on_gpu else torch.bfloat16
        return [
            Case("plain"),
            Case("causal", dict(is_causal=True), dict(causal="top_left")),
            Case("boolean mask", dict(attn_mask=mask), dict(mask=mask)),
            Case("padding", dict(attn_mask=padding), dict(kv_lengths=self.lengths)),
            Case("bias with gradient", dict(attn_mask=bias), dict(bias=bias)),
            Case("dropout", dict(dropout_p=0.1), dict(dropout_p=0.1)),
            Case("dropout + mask", dict(dropout_p=0.1, attn_mask=mask), dict(dropout_p=0.1, mask=mask)),
            Case("fp32" if self.on_gpu else "bf16", dtype=other),
            Case("head dim 96", dim=96),
            Case("head dim 256", dim=256),
            Case("ragged batch", ragged=True),
        ]

    def run(self, case: Case) -> Row:
        """Both sides of a case."""
        torch.manual_seed(0)
        leaves = self._leaves(case)
        extra = [value for value in case.theirs.values() if isinstance(value, torch.Tensor) and value.requires_grad]

        def theirs(q: Any, k: Any, v: Any) -> Any:
            return F.scaled_dot_product_attention(q, k, v, **case.theirs)

        def ours(q: Any, k: Any, v: Any) -> Any:
            return fovea.attention(q, k, v, layout="bhsd", **case.ours)

        row = Row(
            case.name,
            str(leaves[0].dtype).removeprefix("torch."),
            self._measure(theirs, leaves, extra, torch_kernel(lambda: theirs(*leaves))),
            self._measure(ours, leaves, extra, self._fovea_kernel(leaves, case.ours, case.ragged)),
        )
        if row.torch.refused is None and row.fovea.refused is None and "dropout_p" not in case.ours:
            with torch.no_grad():
                out, expected = ours(*leaves), theirs(*leaves)
            if case.ragged:
                out, expected = out.transpose(1, 2).values(), expected.transpose(1, 2).values()
            row.difference = (out.float() - expected.float()).abs().max().item()
        return row

    def overhead(self, rounds: int = 5, calls: int = 300) -> dict[str, float]:
        """Host microseconds of a small call, b1 h1 s16 d64, the least of some rounds that take turns."""
        q, k, v = (torch.randn(1, 1, 16, 64, device=self.device, dtype=self.dtype) for _ in range(3))
        sides = {
            "torch scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(q, k, v),
            "fovea.torch.scaled_dot_product_attention": lambda: fovea.torch.scaled_dot_product_attention(q, k, v),
            "fovea.attention": lambda: fovea.attention(q, k, v, layout="bhsd"),
        }
        least = dict.fromkeys(sides, float("inf"))
        for _ in range(rounds):
            for name, call in sides.items():
                for _ in range(20):
                    call()
                self._wait()
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                least[name] = min(least[name], (time.perf_counter() - start) / calls * 1e6)
                self._wait()
        return least

    def _leaves(self, case: Case) -> list[torch.Tensor]:
        dtype, dim = case.dtype or self.dtype, case.dim or self.dim
        if not case.ragged:
            shape = (self.batch, self.heads, self.seqlen, dim)
            return [torch.randn(shape, device=self.device, dtype=dtype, requires_grad=True) for _ in range(3)]
        total, offsets = int(self.lengths.sum()), F.pad(self.lengths.cumsum(0), (1, 0))
        longest = dict(min_seqlen=int(self.lengths.min()), max_seqlen=int(self.lengths.max()))
        tensors = []
        for _ in range(3):
            values = torch.randn(total, self.heads, dim, device=self.device, dtype=dtype)
            jagged = torch.nested.nested_tensor_from_jagged(values, offsets, **longest).transpose(1, 2)
            tensors.append(jagged.detach().requires_grad_())
        return tensors

    def _measure(self, attend: Callable[..., Any], leaves: list[Any], extra: list[Any], kernel: str) -> Measured:
        measured = Measured(kernel)
        try:
            with torch.no_grad():
                measured.forward_ms = self._median_ms(lambda: attend(*leaves))
                measured.forward_mib = self._peak_mib(lambda: attend(*leaves))
            out = attend(*leaves)
            gradient = torch.ones_like(out) if out.is_nested else torch.randn_like(out)
            wanted = leaves + extra
            measured.backward_ms = self._median_ms(
                lambda: torch.autograd.grad(out, wanted, gradient, retain_graph=True)
            )
            measured.training_mib = self._peak_mib(lambda: torch.autograd.grad(attend(*leaves), wanted, gradient))
        except (RuntimeError, NotImplementedError, ValueError, torch.OutOfMemoryError) as error:
            measured.refused = (str(error).splitlines() or [type(error).__name__])[0]
        return measured

    def _fovea_kernel(self, leaves: list[Any], options: dict[str, Any], ragged: bool) -> str:
        q, k, v = leaves
        if ragged:
            q, k, v = (x.transpose(1, 2).values() for x in leaves)
            ends = F.pad(self.lengths.cumsum(0), (1, 0)).int()
            options = dict(cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=self.seqlen, max_seqlen_kv=self.seqlen)
        try:
            return fovea.explain(q, k, v, layout="bshd" if ragged else "bhsd", **options).backend
        except (RuntimeError, ValueError):  # which the call itself gives, too
            return "none"

    def _median_ms(self, call: Callable[[], Any]) -> float:
        for _ in range(2):
            call()
        times = []
        for _ in range(self.repeats):
            if self.on_gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                call()
                times.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(times)

    def _peak_mib(self, call: Callable[[], Any]) -> float | None:
        """The most memory that a call holds at once: the GPU's, or the process's."""
        gc.collect(1)  # what earlier calls left, not all that was ever imported
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed does not count
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            before = _status_kib("VmRSS")
            call()
            return (_status_kib("VmHWM") - before) / 2**10
        except (OSError, AttributeError):
            return None

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def _status_kib(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))


def _table(rows: list[Row]) -> str:
    head = ["", "forward", "", "", "backward", "", "", "memory, training", "", "max", "kernels", ""]
    names = ["case", "torch", "fovea", "×", "torch", "fovea", "×", "torch", "fovea", "differ", "torch", "fovea"]
    lines = [head, names]
    for row in rows:
        t, f = row.torch, row.fovea
        lines.append(
            [
                row.case,
                _number(t.forward_ms, "ms"),
                _number(f.forward_ms, "ms"),
                _ratio(t.forward_ms, f.forward_ms),
                _number(t.backward_ms, "ms"),
                _number(f.backward_ms, "ms"),
                _ratio(t.backward_ms, f.backward_ms),
                _number(t.training_mib, "MiB"),
                _number(f.training_mib, "MiB"),
                "" if row.difference is None else f"{row.difference:.1e}",
                t.kernel,
                f.kernel,
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


def _number(value: float | None, unit: str) -> str:
    return "refused" if value is None else f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def _ratio(torch_ms: float | None, fovea_ms: float | None) -> str:
    return "" if torch_ms is None or fovea_ms is None else f"{torch_ms / fovea_ms:.2f}"


def main() -> None:
    """The command."""
    print_everywhere()
    parser = argparse.ArgumentParser(prog="python -m fovea.bench", description=__doc__.splitlines()[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_option, default=here, help="cpu, cuda or cuda:N")
    parser.add_argument("--batch", type=count_option, default=4)
    parser.add_argument("--heads", type=count_option, help="default 16 on a GPU, 4 on a CPU")
    parser.add_argument("--seqlen", type=count_option, help="default 4096 on a GPU, 1024 on a CPU")
    parser.add_argument("--dim", type=count_option, help="head dim; default 128 on a GPU, 64 on a CPU")
    parser.add_argument("--repeats", type=count_option, default=7, help="the median of so many runs")
    parser.add_argument("--json", type=file_option, metavar="FILE", help="write everything there, too")
    options = parser.parse_args()
    device = options.device
    on_gpu = device.type == "cuda"
    bench = Bench(
        device,
        options.batch,
        options.heads or (16 if on_gpu else 4),
        options.seqlen or (4096 if on_gpu else 1024),
        options.dim or (128 if on_gpu else 64),
        options.repeats,
    )
    size = f"b{bench.batch} h{bench.heads} s{bench.seqlen} d{bench.dim}"
    where = f"{device_name(device)}, PyTorch {torch.__version__}, Fovea {fovea.__version__}"
    if not on_gpu:
        where += f", {torch.get_num_threads()} threads"
    print(f"{where}\n{size} {str(bench.dtype).removeprefix('torch.')}, × is PyTorch's time over Fovea's\n", flush=True)
    rows = []
    cases = bench.cases()
    for number, case in enumerate(cases, 1):
        if sys.stderr.isatty():
            print(f"\r\x1b[K[{number}/{len(cases)}] {case.name}", end="", file=sys.stderr, flush=True)
        rows.append(bench.run(case))
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    print(_table(rows))
    for row in rows:
        for side, measured in (("torch", row.torch), ("fovea", row.fovea)):
            if measured.refused is not None:
                print(f"{row.case}: {side} refused: {measured.refused}")
    overhead = bench.overhead()
    print("\nhost time of a call, b1 h1 s16 d64: " + ", ".join(f"{name} {us:.1f} µs" for name, us in overhead.items()))
    if options.json:
        results = {
            "device": device_name(device),
            "torch": torch.__version__,
            "fovea": fovea.__version__,
            "size": size,
            "dtype": str(bench.dtype).removeprefix("torch."),
            "rows": [asdict(row) for row in rows],
            "host_us": overhead,
        }
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)
        print(f"written: {options.json}")


if __name__ == "__main__":
    main()
