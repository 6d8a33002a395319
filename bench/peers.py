"""Fovea against PyTorch's attention backends on a GPU, in one run: interleaved, medians, L2 flushed before each.

    python3 bench/peers.py --lib build/shared/src/libfovea.so [--quick] [--backend NAME] [--json FILE] [LINE | @FILE ...]

Without lines: bench/grid.txt, bench/beyond.txt and the memory of the longest sequences.  Masks hide a tenth of the entries,
or, where a line's name says "blocks of 128", half of the blocks of 128 by 128.  Fovea is called through its
C interface (include/fovea/c.h) on PyTorch's memory and stream.  Backward times are of the gradients alone, with out and lse
there.  TFLOP/s count as the papers do.  Needs PyTorch with CUDA.
"""

import argparse
import ctypes
import datetime
import json
import math
import re
import statistics
import sys
import warnings
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HERE = Path(__file__).resolve().parent
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
DEVICE = "cuda"  # bench/peers_cpu.py says "cpu"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLUSH_BYTES = 256 << 20  # more than any L2
# Of the papers' grid, 512 to 16384: the best of FlashAttention-3, FlashAttention-4 and cuDNN as a multiple of cuDNN, each
# measured beside cuDNN on an H100.
TO_BEAT = {
    ("forward", 64, False): (1.00, 1.00, 1.05, 1.10, 1.23, 1.20),
    ("forward", 64, True): (1.00, 1.00, 1.02, 1.04, 1.19, 1.17),
    ("forward", 128, False): (1.00, 1.05, 1.04, 1.09, 1.09, 1.13),
    ("forward", 128, True): (1.00, 1.03, 1.11, 1.15, 1.15, 1.19),
    ("forward", 256, False): (1.00, 1.06, 1.07, 1.11, 1.13, 1.07),
    ("forward", 256, True): (1.00, 1.03, 1.08, 1.14, 1.17, 1.18),
    ("backward", 64, False): (1.23, 1.17, 1.14, 1.16, 1.24, 1.18),
    ("backward", 64, True): (1.22, 1.27, 1.23, 1.20, 1.22, 1.25),
    ("backward", 128, False): (1.05, 1.11, 1.13, 1.13, 1.15, 1.13),
    ("backward", 128, True): (1.09, 1.11, 1.12, 1.12, 1.17, 1.18),
    ("backward", 256, False): (1.21, 1.22, 1.19, 1.23, 1.28, 1.30),
    ("backward", 256, True): (1.04, 1.12, 1.17, 1.21, 1.20, 1.24),
}
GRID_TOKENS, GRID_WIDTH = 16384, 2048
HEAD_START_CYCLES = 500_000  # the GPU waits so long that Python has queued what is timed


# ---- the C interface ---------------------------------------------------------------------------------------------------

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.bool: 3, torch.int32: 4}
CPU, CUDA = 0, 1


class CDevice(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("index", ctypes.c_int32), ("compute_capability", ctypes.c_int32)]


class CTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("rank", ctypes.c_int32), ("device", CDevice),
                ("shape", ctypes.c_int64 * 4), ("strides", ctypes.c_int64 * 4)]


def c_device():
    return CDevice(CUDA, torch.cuda.current_device(), 0) if DEVICE == "cuda" else CDevice(CPU, 0, 0)


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def sized_struct(name, tensors):
    fields = [("size", ctypes.c_size_t)] + [(tensor, ctypes.POINTER(CTensor)) for tensor in tensors]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


CInputs = sized_struct("CInputs", ["q", "k", "v", "mask", "bias", "alibi_slopes", "sink", "q_lengths", "kv_lengths",
                                   "cu_seqlens_q", "cu_seqlens_kv", "out", "lse", "dout", "dlse"])
COutputs = sized_struct("COutputs", ["out", "lse", "dq", "dk", "dv", "dbias", "dalibi_slopes", "dsink"])


class CPlanOptions(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("backend", ctypes.c_char_p), ("strict", ctypes.c_int32),
                ("num_threads", ctypes.c_int32)]


def filled(struct, tensors):
    """A sized struct that points at these tensors' memory."""
    made = struct(size=ctypes.sizeof(struct))
    for name, t in tensors.items():
        view = CTensor(data=t.data_ptr(), dtype=CODES[t.dtype], rank=t.dim(), device=c_device())
        view.shape[: t.dim()] = t.shape
        view.strides[: t.dim()] = t.stride()
        setattr(made, name, ctypes.pointer(view))
    return made


class Refused(Exception):
    pass


class Library:
    def __init__(self, path, backend=None):
        self.c = ctypes.CDLL(str(path))
        self.plan_options = CPlanOptions(size=ctypes.sizeof(CPlanOptions), backend=backend.encode() if backend else None)
        for name in ("fovea_version", "fovea_last_error", "fovea_plan_report"):
            getattr(self.c, name).restype = ctypes.c_char_p
        for name in ("fovea_plan_report", "fovea_plan_destroy"):
            getattr(self.c, name).argtypes = [ctypes.c_void_p]
        self.c.fovea_plan_workspace_bytes.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)]
        self.c.fovea_plan_execute.argtypes = [ctypes.c_void_p] * 5
        self.version = self.c.fovea_version().decode()

    def check(self, status):
        if status != 0:
            raise Refused(self.c.fovea_last_error().decode())


class FoveaPlan:
    """One direction of a problem line, its tensors and a workspace of its own."""

    def __init__(self, library, line, inputs, outputs):
        self.library, self.handle = library, ctypes.c_void_p()
        device = c_device()
        library.check(library.c.fovea_plan_from_line(line.encode(), ctypes.byref(device), ctypes.byref(library.plan_options),
                                                     ctypes.byref(self.handle)))
        size = ctypes.c_size_t()
        library.check(library.c.fovea_plan_workspace_bytes(self.handle, ctypes.byref(size)))
        self.workspace_bytes = size.value
        self.workspace = torch.empty(max(size.value, 64), dtype=torch.uint8, device=DEVICE)
        self.tensors = (inputs, outputs)  # alive as long as the plan
        self.inputs, self.outputs = filled(CInputs, inputs), filled(COutputs, outputs)
        self.report = library.c.fovea_plan_report(self.handle).decode()

    def __call__(self):
        stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else None
        self.library.check(self.library.c.fovea_plan_execute(self.handle, ctypes.byref(self.inputs), ctypes.byref(self.outputs),
                                                             self.workspace.data_ptr(), stream))

    def __del__(self):
        if self.handle:
            self.library.c.fovea_plan_destroy(self.handle)


# ---- problems ----------------------------------------------------------------------------------------------------------


class Problem:
    """What a problem line says, as far as these lists use it."""

    def __init__(self, line, name=""):
        self.line, self.name = line.strip(), name.strip()
        words = self.line.split()
        self.direction, self.dtype = words[0], DTYPES[words[1]]
        self.options = dict(word.split("=", 1) if "=" in word else (word, "") for word in words[2:] if not self.size(word))
        sizes = dict(self.size(word) for word in words[2:] if self.size(word))
        self.batch, self.hq = sizes.get("b", 1), sizes["hq"]
        self.hkv, self.d = sizes.get("hkv", sizes["hq"]), sizes["d"]
        self.dv, self.sq = sizes.get("dv", self.d), sizes.get("sq", 0)
        self.skv = sizes.get("skv", self.sq)
        self.documents = [int(x) for x in self.options.get("packed", "").split("+") if x]
        self.causal = "causal" in self.options

    @staticmethod
    def size(word):
        for key in ("hkv", "skv", "hq", "sq", "dv", "b", "d"):
            if word.startswith(key) and word[len(key):].isdigit():
                return key, int(word[len(key):])
        return None

    def passes(self):
        return {"fwd": ["forward"], "bwd": ["backward"], "fwd+bwd": ["forward", "backward"]}[self.direction]

    def one_way(self, direction):
        return {"forward": "fwd", "backward": "bwd"}[direction] + self.line[len(self.direction):]

    def shape(self):
        """What lines have in common that are held against each other."""
        return self.dtype, self.hq, self.hkv, self.d, self.dv, sum(self.documents) or self.batch * self.sq

    def flops(self, direction):
        pairs = sum(n * n for n in self.documents) or self.batch * self.sq * self.skv
        return 2 * (self.d + self.dv) * self.hq * pairs * (0.5 if self.causal else 1) * (2.5 if direction == "backward" else 1)

    def to_beat(self, direction):
        """How many times as fast as cuDNN the best of its kind is, for a cell of the papers' grid, else None."""
        row = TO_BEAT.get((direction, self.d, self.causal))
        cell = self.batch * self.sq == GRID_TOKENS and self.hq * self.d == GRID_WIDTH and self.hq == self.hkv
        plain = self.dv == self.d and self.skv == self.sq and self.dtype == torch.bfloat16 and not set(self.options) - {"causal"}
        at = self.sq.bit_length() - 10
        return row[at] if row and cell and plain and 0 <= at < len(row) and self.sq == 512 << at else None

    def bytes_forward(self):
        rows = self.batch * (self.hq * self.sq * (self.d + self.dv) + self.hkv * self.skv * (self.d + self.dv))
        return rows * self.dtype.itemsize


class Tensors:
    """Random tensors of a problem as [batch, seqlen, heads, dim], or packed, and what else it names."""

    def __init__(self, p):
        generator = torch.Generator(DEVICE).manual_seed(1)

        def normal(*shape, dtype=p.dtype):
            return torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype)

        def rows(seqlen, heads, dim):
            return normal(sum(p.documents), heads, dim) if p.documents else normal(p.batch, seqlen, heads, dim)

        def extent(letters):
            full = {"b": p.batch, "h": p.hq, "q": p.sq, "k": p.skv, "1": 1}
            return [full[letter] for letter in letters.split(":")[0]]

        self.q, self.k, self.v = rows(p.sq, p.hq, p.d), rows(p.skv, p.hkv, p.d), rows(p.skv, p.hkv, p.dv)
        self.dout, self.out = rows(p.sq, p.hq, p.dv), rows(p.sq, p.hq, p.dv)
        lse = (p.hq, sum(p.documents)) if p.documents else (p.batch, p.hq, p.sq)
        self.lse = normal(*lse, dtype=torch.float32)
        self.dq, self.dk, self.dv = (torch.empty_like(t) for t in (self.q, self.k, self.v))
        self.named = {}
        if "mask" in p.options:
            shape = extent(p.options["mask"])
            block = 128 if "blocks of 128" in p.name else 1
            seen = torch.rand([*shape[:2], *(-(-n // block) for n in shape[2:])], generator=generator, device=DEVICE)
            seen = seen < (0.5 if block > 1 else 0.9)
            seen = seen.repeat_interleave(block, 2).repeat_interleave(block, 3) if block > 1 else seen
            self.named["mask"] = seen[:, :, : shape[2], : shape[3]].contiguous()
        if "bias" in p.options:
            self.named["bias"] = normal(*extent(p.options["bias"]))
        if "alibi" in p.options:
            self.named["alibi_slopes"] = torch.tensor([2.0 ** (-8 * (h + 1) / p.hq) for h in range(p.hq)], device=DEVICE)
        if "sink" in p.options:
            self.named["sink"] = normal(p.hq, dtype=torch.float32)
        if "kvlen" in p.options:
            lengths = [int(x) for x in p.options["kvlen"].split(",")]
            self.named["kv_lengths"] = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        if p.documents:
            ends = torch.tensor([0] + p.documents).cumsum(0).to(torch.int32).to(DEVICE)
            self.named["cu_seqlens_q"] = self.named["cu_seqlens_kv"] = ends

    def fovea(self, library, p, direction):
        inputs = {"q": self.q, "k": self.k, "v": self.v, **self.named}
        outputs = {"out": self.out, "lse": self.lse}
        if direction == "backward":
            inputs |= {"out": self.out, "lse": self.lse, "dout": self.dout}
            outputs = {"dq": self.dq, "dk": self.dk, "dv": self.dv}
        return FoveaPlan(library, p.one_way(direction), inputs, outputs)

    def torch(self, p, direction, backend):
        """The same by one of PyTorch's backends; None where it cannot be said to them."""
        unsaid = {"window", "softcap", "sink", "alibi", "packed", "deterministic"} & set(p.options)
        if unsaid or (p.causal and p.sq != p.skv):
            return None
        mask = self.named.get("mask")
        if "kv_lengths" in self.named:
            keys = torch.arange(p.skv, device=DEVICE)
            mask = (keys < self.named["kv_lengths"][:, None])[:, None, None, :]
        if "bias" in self.named:
            bias = self.named["bias"]
            mask = bias if mask is None else torch.where(mask, bias, torch.tensor(-math.inf, dtype=p.dtype, device=DEVICE))
        if mask is not None:
            mask = mask.expand(p.batch, p.hq, p.sq, p.skv)
        q, k, v = (t.transpose(1, 2).detach() for t in (self.q, self.k, self.v))
        backward = direction == "backward"
        for t in (q, k, v):
            t.requires_grad_(backward)

        def attend():
            with sdpa_kernel(backend), torch.set_grad_enabled(backward):
                return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=float(p.options.get("dropout", 0)),
                                                    is_causal=p.causal, enable_gqa=p.hq != p.hkv)

        if not backward:
            return attend
        out, dout = attend(), self.dout.transpose(1, 2)
        return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def results_of(tensors, direction, returned):
    """What a contender has made, as [batch, seqlen, heads, dim]; Fovea writes into `tensors`."""
    if returned is None:
        return [tensors.out] if direction == "forward" else [tensors.dq, tensors.dk, tensors.dv]
    return [t.transpose(1, 2) for t in (returned if isinstance(returned, tuple) else (returned,))]


# ---- measuring ---------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, seconds, most):
        self.seconds, self.most = seconds, most
        self.scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def once(self, work):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scratch.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        work()
        end.record()
        return start, end

    def compare(self, contenders):
        """Median milliseconds of each, taken in turns."""
        warm = {name: self.once(work) for name, work in contenders.items()}
        warm = {name: self.once(work) for name, work in contenders.items()}
        torch.cuda.synchronize()
        longest = sum(start.elapsed_time(end) for start, end in warm.values())
        repeats = max(5, min(self.most, int(self.seconds * 1e3 / max(longest, 1e-3))))
        events = {name: [] for name in contenders}
        for _ in range(repeats):
            for name, work in contenders.items():
                events[name].append(self.once(work))
        torch.cuda.synchronize()
        return {name: statistics.median(start.elapsed_time(end) for start, end in pairs) for name, pairs in events.items()}


def difference(ours, theirs):
    """Relative distance of the worst result; NaN, which Python's max would pass over, where one is NaN."""
    pairs = [(a.float(), b.float()) for a, b in zip(ours, theirs)]
    return torch.stack([(a - b).norm() / b.norm().clamp_min(1e-30) for a, b in pairs]).max().item()


def why_not(error, warned=()):
    """One sentence; PyTorch says in warnings which of a backend's conditions is not met."""
    told = [re.sub(r" \(Triggered internally.*", "", str(w.message)) for w in warned]
    told = [text for text in told if "runtime disabled" not in text and "not used because" not in text]
    return " ".join(told or [str(error).strip().split("\n")[0]])[:200]


def contenders_of(library, p, direction, tensors):
    """Who runs this, and for the others why not; Fovea's forward has run when this returns."""
    ready, refusals = {}, {}
    try:
        tensors.fovea(library, p, "forward")()
        ready["fovea"] = tensors.fovea(library, p, direction)
    except Refused as error:
        refusals["fovea"] = why_not(error)
    for name, backend in PEERS.items():
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                work = tensors.torch(p, direction, backend)
                if work is None:
                    refusals[name] = "has no such option"
                    continue
                work()
                synchronize()
                ready[name] = work
            except (RuntimeError, torch.OutOfMemoryError) as error:
                refusals[name] = why_not(error, warned)
    return ready, refusals


def measure(library, clock, p, direction, plain=None):
    """A row, and Fovea's plan.  plain: the plan without options, in turns with this one, for a GPU held to its power is as fast as
    what runs beside lets it be."""
    tensors = Tensors(p)
    ready, refusals = contenders_of(library, p, direction, tensors)
    row = {"line": p.one_way(direction), "name": p.name, "pass": direction, "refusals": refusals, "milliseconds": {}}
    if ready:
        row["milliseconds"] = clock.compare(ready)
    row["tflops"] = {name: p.flops(direction) / ms / 1e9 for name, ms in row["milliseconds"].items()}
    if p.sq == 1:
        row["gbytes_per_second"] = {name: p.bytes_forward() / ms / 1e6 for name, ms in row["milliseconds"].items()}
    if "fovea" in ready:
        row["workspace_bytes"] = ready["fovea"].workspace_bytes
        row["report"] = ready["fovea"].report
        ours = row["milliseconds"]["fovea"]
        row["speedup"] = {name: ms / ours for name, ms in row["milliseconds"].items() if name != "fovea"}
        row["to_beat_over_cudnn"] = p.to_beat(direction)
        peer = next((name for name in ("cudnn", "flash", "efficient", "math") if name in ready), None)
        if peer and "dropout" not in p.options:
            ready["fovea"]()
            row["difference"] = difference(results_of(tensors, direction, None), results_of(tensors, direction, ready[peer]()))
        if plain:
            both = clock.compare({"fovea": ready["fovea"], "plain": plain})
            row["over_plain"] = both["fovea"] / both["plain"]
    return row, ready.get("fovea")


def memory_of(library, p, direction):
    """Bytes that a pass takes beyond its inputs and results, for each contender."""
    tensors = Tensors(p)
    ready, _ = contenders_of(library, p, direction, tensors)
    taken = {}
    for name, work in ready.items():
        if name == "fovea":
            taken[name] = work.workspace_bytes
            continue
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = results_of(tensors, direction, work())
        own = sum(t.numel() * t.element_size() for t in results)
        taken[name] = torch.cuda.max_memory_allocated() - before - own
        del results
    return {"line": p.one_way(direction), "pass": direction, "extra_bytes": taken}


def ceilings(clock):
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x, y = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    ms = clock.compare({"product": lambda: a @ b, "copy": lambda: y.copy_(x)})
    return {"bf16_product_tflops": 2 * 8192**3 / ms["product"] / 1e9, "copy_gbytes_per_second": 2 * (1 << 30) / ms["copy"] / 1e6}


# ---- telling -----------------------------------------------------------------------------------------------------------


def tell(row):
    figures = row.get("gbytes_per_second") or row["tflops"]
    words = [f"{figures[name]:7.0f}" if name in figures else "      -" for name in ("fovea", *PEERS)]
    ratios = [f"{row['speedup'][name]:6.2f}" if name in row.get("speedup", {}) else "     -" for name in PEERS]
    label = row["name"] or row["line"].split(" ", 2)[2].replace("=bottom_right", "")
    text = f"{label:32.32} {row['pass']:8} {row['milliseconds'].get('fovea', math.nan):8.3f} {' '.join(words)}  {' '.join(ratios)}"
    if row.get("to_beat_over_cudnn"):
        text += f"  {row['to_beat_over_cudnn']:5.2f} to beat"
    if "over_plain" in row:
        text += f"  {row['over_plain']:5.2f}"
    if not row.get("difference", 0) <= 0.02:
        text += f"  DIFFERS by {row['difference']:.3f}"
    if "fovea" in row["refusals"]:
        text += "  fovea: " + row["refusals"]["fovea"]
    print(text, flush=True)


HEADING = f"{'':32} {'':8} {'':8} {'TFLOP/s (decode: GB/s)':^31}  {'times as fast as':^20}\n" \
          f"{'':32} {'pass':8} {'fovea ms':>8} {'fovea':>7} {'flash':>7} {'cudnn':>7} {'effic.':>7}  {'flash':>6} {'cudnn':>6} {'effic.':>6}  ×plain"


def summary_of(rows):
    """Geometric mean and least of how many times as fast Fovea is, for each pass and peer."""
    summary = {}
    for direction in ("forward", "backward"):
        for peer in PEERS:
            ratios = [row["speedup"][peer] for row in rows if row["pass"] == direction and peer in row.get("speedup", {})]
            if ratios:
                summary[f"{direction} over {peer}"] = {"cells": len(ratios), "least": min(ratios),
                                                       "geometric_mean": statistics.geometric_mean(ratios)}
    return summary


def run_list(library, clock, problems, title):
    print(f"\n{title}\n{HEADING}", flush=True)
    rows, plain = [], {}
    for p in problems:
        for direction in p.passes():
            alike = problems[0].name and p.shape() == problems[0].shape()
            row, plan = measure(library, clock, p, direction, plain.get(direction) if alike else None)
            plain.setdefault(direction, plan)
            tell(row)
            rows.append(row)
    summary = summary_of(rows)
    for what, figures in summary.items():
        print(f"  {what}: {figures['geometric_mean']:.3f} in the geometric mean of {figures['cells']}, least {figures['least']:.3f}")
    return {"rows": rows, "summary": summary}


def lines_of(path):
    for line in Path(path).read_text().splitlines():
        text, _, name = line.partition("#")
        if text.strip():
            yield Problem(text, name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lines", nargs="*", help="problem lines or @FILE; bench/grid.txt, bench/beyond.txt and memory where left out")
    parser.add_argument("--lib", default=HERE.parent / "build/shared/src/libfovea.so", help="libfovea.so")
    parser.add_argument("--backend", help="Fovea by this backend, as in cuda_portable")
    parser.add_argument("--quick", action="store_true", help="a third of the grid, fewer runs")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each cell, beyond the warm-up")
    parser.add_argument("--most", type=int, default=30, help="runs of a cell")
    parser.add_argument("--json", help="write the numbers to this file")
    said = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("peers.py: PyTorch sees no GPU; run it where there is one")

    library = Library(said.lib, said.backend)
    clock = Clock(said.seconds / (3 if said.quick else 1), 7 if said.quick else said.most)
    page = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "fovea": library.version,
            "backend": said.backend, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(), "ceilings": ceilings(clock)}
    print(f"{page['gpu']}, PyTorch {page['torch']}, cuDNN {page['cudnn']}, Fovea {library.version}; product "
          f"{page['ceilings']['bf16_product_tflops']:.0f} TFLOP/s, copy {page['ceilings']['copy_gbytes_per_second']:.0f} GB/s")

    if said.lines:
        problems = [p for text in said.lines for p in (lines_of(text[1:]) if text.startswith("@") else [Problem(text)])]
        page["lines"] = run_list(library, clock, problems, "lines")
    else:
        grid, beyond = list(lines_of(HERE / "grid.txt")), list(lines_of(HERE / "beyond.txt"))
        longest = [p for p in beyond if p.sq == max(p.sq for p in beyond)]
        if said.quick:
            grid = [p for p in grid if p.sq in (512, 4096)]
            beyond = [p for p in beyond if p not in longest]
        page["grid"] = run_list(library, clock, grid, "the papers' grid")
        page["beyond"] = run_list(library, clock, beyond, "beyond the grid")
        page["memory"] = [memory_of(library, p, direction) for p in longest[:1] for direction in p.passes()]
        for row in page["memory"]:
            taken = ", ".join(f"{name} {count / 2**20:.1f} MiB" for name, count in row["extra_bytes"].items())
            print(f"memory beyond inputs and results, {row['line']}: {taken}")
    if said.json:
        Path(said.json).write_text(json.dumps(page, indent=1) + "\n")


if __name__ == "__main__":
    main()
