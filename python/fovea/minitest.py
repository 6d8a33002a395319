"""python -m fovea.minitest: one attention layer in training, by PyTorch's ways and by Fovea's, option by option.

Everyone starts from the same weights and sees the same batch; steps are taken in turns, through all options, so that a
busy machine disturbs all alike. A step is forward, loss, backward and AdamW.
"""

from __future__ import annotations

import argparse
import ctypes
import html
import importlib.util
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fovea
import fovea.nn
from fovea._observe import (
    count_option,
    device_name,
    device_option,
    file_option,
    print_everywhere,
    program_option,
    torch_kernel,
)

CHECKED = 4  # steps whose losses are compared: later ones grow apart, however small the first difference is
REDRAWN = 8  # trainings of the textbook's with other dropout, from which its spread is known
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class OptionSet:
    """What is asked of a layer."""

    name: str
    mask: bool = False
    dropout: float = 0.0
    ragged: bool = False


SETS = [
    OptionSet("none"),
    OptionSet("mask", mask=True),
    OptionSet("dropout", dropout=0.1),
    OptionSet("mask + dropout", mask=True, dropout=0.1),
    OptionSet("ragged", ragged=True),
]


class Task:
    """The batch, and what the layer should learn of it."""

    def __init__(
        self, options: OptionSet, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        batch, seqlen, embed = shape
        self.options = options
        generator = torch.Generator().manual_seed(7)
        self.x, self.target = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
        ignore = torch.rand(seqlen, seqlen, generator=generator) < 0.25  # of no special form
        self.mask = ignore.fill_diagonal_(False).to(device) if options.mask else None
        lengths = torch.linspace(max(1, seqlen // 10), seqlen, batch).int()
        self.padding = (torch.arange(seqlen) >= lengths[:, None]).to(device) if options.ragged else None
        read = torch.ones(batch, seqlen, 1) if self.padding is None else ~self.padding[..., None]
        self.read = read.to(device, torch.float32)
        self.count = int(self.read.sum()) * embed

    def keep(self) -> Tensor | None:
        """Who is seen, as scaled_dot_product_attention takes it."""
        if self.padding is not None:
            return ~self.padding[:, None, None]
        return None if self.mask is None else ~self.mask

    def loss(self, out: Tensor) -> Tensor:
        """The mean square of what is read."""
        return (((out.float() - self.target.float()) * self.read).square()).sum() / self.count

    def exact_loss(self, out: Tensor) -> float:
        """The same of the same out, with no rounding of its own."""
        return (((out.double() - self.target.double()) * self.read).square()).sum().item() / self.count


# ---- contestants: what makes out of the batch


class Custom(torch.nn.MultiheadAttention):
    """The layer as one writes it around a function of q, k, v [batch, heads, seqlen, head_dim], what is seen, and p."""

    attend: Callable[..., Tensor]

    def run(self, task: Task) -> Tensor:
        """[batch, seqlen, embed_dim]."""
        qkv = F.linear(task.x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = self.attend(q, k, v, task.keep(), self.dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Textbook(Custom):
    """Scores, softmax, dropout and weights one after the other."""

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, p: float) -> Tensor:
        """[batch, heads, seqlen, head_dim]."""
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if keep is not None:
            scores = scores.masked_fill(~keep, -torch.inf)
        return F.dropout(torch.softmax(scores, -1), p) @ v


class Sdpa(Custom):
    """On PyTorch's scaled_dot_product_attention."""

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, p: float) -> Tensor:
        """[batch, heads, seqlen, head_dim]."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, dropout_p=p)


class Flash(Custom):
    """On flash_attn, without padding where there is some."""

    def run(self, task: Task) -> Tensor:
        """[batch, seqlen, embed_dim]."""
        from flash_attn import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func

        if task.mask is not None:
            raise NotImplementedError("flash_attn has no masks")
        x = task.x
        if task.padding is not None:
            places = (~task.padding).flatten().nonzero().squeeze(1)
            x = x.flatten(0, 1)[places]
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        if task.padding is None:
            return self.out_proj(flash_attn_qkvpacked_func(qkv, self.dropout).flatten(-2))
        lengths = (~task.padding).sum(1)
        ends = F.pad(lengths.cumsum(0), (1, 0)).int()
        rows = self.out_proj(flash_attn_varlen_qkvpacked_func(qkv, ends, task.x.shape[1], self.dropout).flatten(-2))
        return torch.zeros_like(task.x).flatten(0, 1).index_copy(0, places, rows).view_as(task.x)


class OfTorch(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention itself."""

    def run(self, task: Task) -> Tensor:
        """[batch, seqlen, embed_dim]."""
        x = task.x
        return self(x, x, x, key_padding_mask=task.padding, need_weights=False, attn_mask=task.mask)[0]


class OfFovea(fovea.nn.MultiheadAttention):
    """fovea.nn.MultiheadAttention itself."""

    pack_padding = True

    run = OfTorch.run


class Training:
    """A layer with its optimiser."""

    def __init__(self, kind: type, task: Task, heads: int, weights: dict[str, Tensor]) -> None:
        self.task = task
        device, dtype = task.x.device, task.x.dtype
        self.layer = kind(task.x.shape[2], heads, task.options.dropout, batch_first=True, device=device, dtype=dtype)
        self.layer.load_state_dict(weights)
        self.optimiser = torch.optim.AdamW(self.layer.parameters(), LEARNING_RATE)

    def step(self) -> tuple[float, float]:
        """(milliseconds, loss before the step)."""
        self._wait()
        start = time.perf_counter()
        out = self.layer.run(self.task)
        loss = self.task.loss(out)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self._wait()
        return 1e3 * (time.perf_counter() - start), self.task.exact_loss(out.detach())

    def kernel(self) -> str:
        """What attention runs on."""
        task, layer = self.task, self.layer
        if isinstance(layer, OfFovea):
            report = layer.explain(task.x, mask=task.mask, key_padding_mask=task.padding)
            return report.forward.backend + (", packed" if report.packed else "")
        if isinstance(layer, Flash):
            return "flash_attn" + (", packed" if task.padding is not None else "")
        return torch_kernel(lambda: layer.run(task))

    def close(self) -> None:
        """Nothing is left behind."""

    def _wait(self) -> None:
        if self.task.x.device.type == "cuda":
            torch.cuda.synchronize()


def cpp_environment() -> dict[str, str]:
    """For a program in C++: it does not look for NVIDIA's libraries where torch's wheel brings them."""
    packages = Path(torch.__file__).parents[1]
    found = {}
    for variable, patterns in {
        "FOVEA_NVRTC": ("nvidia/cu13/lib/libnvrtc.so.*", "nvidia/cuda_nvrtc/lib/libnvrtc.so.*"),
        "FOVEA_CUBLASLT": ("nvidia/cu13/lib/libcublasLt.so.*", "nvidia/cublas/lib/libcublasLt.so.*"),
    }.items():
        files = [file for pattern in patterns for file in sorted(packages.glob(pattern)) if "alt" not in file.name]
        if files:
            found[variable] = str(files[0])
    return found | os.environ


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file, whose package need not be there."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL", torch.int32: "I32"}
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    offset = 0
    for name, tensor in tensors.items():
        host = tensor.detach().cpu().contiguous()
        parts.append(ctypes.string_at(host.data_ptr(), host.nbytes))
        end = offset + host.nbytes
        header[name] = {"dtype": names[host.dtype], "shape": list(host.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


class TrainingInCpp:
    """The program tests/nn/minitest.cpp, which takes a step for every line that it reads."""

    def __init__(self, program: str, task: Task, heads: int, weights: dict[str, Tensor]) -> None:
        tensors = {"x": task.x, "target": task.target} | {f"weight/{name}": w for name, w in weights.items()}
        if task.mask is not None:
            tensors["attn_mask"] = task.mask
        if task.padding is not None:  # C++ is given what it would hold: the batch without padding
            keep = ~task.padding
            tensors |= {"x": task.x[keep], "target": task.target[keep]}
            tensors["cu_seqlens"] = F.pad(keep.sum(1).cumsum(0), (1, 0)).int()
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "task.safetensors"
        _save(tensors, path)
        self.packed = task.padding is not None
        command = [program, task.x.device.type, str(path), str(heads), str(task.options.dropout), str(LEARNING_RATE)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=cpp_environment()
        )
        self.backend = self._answer(1)[0]

    def step(self) -> tuple[float, float]:
        """(milliseconds, loss before the step)."""
        print(file=self.process.stdin, flush=True)
        ms, loss = self._answer(2)
        return float(ms), float(loss)

    def kernel(self) -> str:
        """What attention runs on."""
        return self.backend + (", packed" if self.packed else "")

    def close(self) -> None:
        """Ends the program and removes its file."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()

    def _answer(self, count: int) -> list[str]:
        words = self.process.stdout.readline().split()
        if len(words) != count:
            raise RuntimeError(f"{self.process.args[0]} ended with {self.process.wait()}")
        return words


# ---- the test


@dataclass
class Cell:
    """One contestant with one option set; numbers are None where it was refused."""

    contestant: str
    options: str
    kernel: str = ""
    ms: float | None = None
    spread_ms: float | None = None
    losses: list[float] = field(default_factory=list)
    #: How far its first losses are from the exact ones, over how far the plain formula's are; at most 2.
    error: float | None = None
    refused: str = ""

    @property
    def agrees(self) -> bool:
        """By the error rule."""
        return self.error is not None and self.error <= 2.0

    @property
    def fails(self) -> bool:
        """Whether it is wrong, or Fovea's and not there: others may refuse what they do not have."""
        return self.contestant.startswith("Fovea") if self.ms is None else not self.agrees


class Minitest:
    """All contestants on one device."""

    def __init__(
        self, device: torch.device, steps: int, shape: tuple[int, int, int], heads: int = 8, cpp: str | None = None
    ) -> None:
        self.device, self.steps, self.shape, self.heads = device, steps, shape, heads
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(11)
        layer = torch.nn.MultiheadAttention(shape[2], heads)
        self.weights = {name: w.to(device, self.dtype) for name, w in layer.state_dict().items()}
        self.contestants: dict[str, Any] = {
            "textbook": Textbook,
            "torch.nn": OfTorch,
            "torch SDPA": Sdpa,
            "flash_attn": Flash,
            "Fovea Python": OfFovea,
            "Fovea C++": cpp,
        }
        self.absent: dict[str, str] = {}
        if importlib.util.find_spec("flash_attn") is None:
            self.absent["flash_attn"] = "not installed"
        elif device.type != "cuda":
            self.absent["flash_attn"] = "does not run on CPUs"
        if not cpp:
            self.absent["Fovea C++"] = "--cpp names no program; `./dev test` builds build/release/tests/fovea_minitest"
        for name in self.absent:
            del self.contestants[name]

    def run(self, progress: Callable[[str, int], None]) -> list[Cell]:
        """Every contestant with every option set; `progress` is told what is done, and how many steps everyone took."""
        tasks = {options.name: Task(options, self.shape, self.device, self.dtype) for options in SETS}
        cells = [Cell(name, options) for options in tasks for name in self.contestants]
        trainings = {}
        for cell in cells:
            progress(f"rehearsal: {cell.contestant}, {cell.options}", 0)
            kind, task = self.contestants[cell.contestant], tasks[cell.options]
            try:
                cell.kernel = self._rehearse(kind, task)
                trainings[cell.contestant, cell.options] = self._training(kind, task)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                cell.refused = (str(error).splitlines() or [type(error).__name__])[0]
        running = [cell for cell in cells if not cell.refused]
        times: dict[tuple[str, str], list[float]] = {key: [] for key in trainings}
        for step in range(self.steps):
            for cell in running:
                progress(f"{cell.contestant}, {cell.options}", step)
                torch.manual_seed(step)
                ms, loss = trainings[cell.contestant, cell.options].step()
                times[cell.contestant, cell.options].append(ms)
                cell.losses.append(loss)
        for training in trainings.values():
            training.close()
        textbooks = {cell.options: cell.losses for cell in running if cell.contestant == "textbook"}
        progress("what the losses should be", self.steps)
        references = {options: self._references(task, textbooks[options]) for options, task in tasks.items()}
        for cell in running:
            taken = times[cell.contestant, cell.options]
            quarters = statistics.quantiles(taken, n=4) if self.steps > 1 else [0.0, 0.0, 0.0]
            cell.ms, cell.spread_ms = statistics.median(taken), quarters[2] - quarters[0]
            exact, plain = references[cell.options]
            cell.error = _distance(cell.losses, exact) / plain
        return cells

    def _rehearse(self, kind: Any, task: Task) -> str:
        """Two steps that compile and allocate what is needed; returns what attention ran on."""
        rehearsal = self._training(kind, task)
        try:
            for _ in range(2):
                rehearsal.step()
            return rehearsal.kernel()
        finally:
            rehearsal.close()

    def _training(self, kind: Any, task: Task) -> Any:
        make = TrainingInCpp if isinstance(kind, str) else Training
        return make(kind, task, self.heads, self.weights)

    def _references(self, task: Task, textbook: list[float]) -> tuple[list[float], float]:
        """The first losses as they should be, and how far from that the plain formula's may be.

        Without dropout: the textbook's in double precision. With it, everyone draws other numbers: the textbook's, and
        how far it is from itself when it draws others, several times, for once may be near by chance.
        """
        steps = min(CHECKED, self.steps)
        if task.options.dropout:
            distances = []
            for seed in range(999, 999 + REDRAWN):
                again = Training(Textbook, task, self.heads, self.weights)
                torch.manual_seed(seed)
                distances.append(_distance([again.step()[1] for _ in range(steps)], textbook))
            return textbook[:steps], math.sqrt(statistics.fmean(d * d for d in distances))
        exact_task = Task(task.options, self.shape, self.device, torch.float64)
        exact_task.x, exact_task.target = task.x.double(), task.target.double()
        doubles = {name: w.double() for name, w in self.weights.items()}
        training = Training(Textbook, exact_task, self.heads, doubles)
        exact = [training.step()[1] for _ in range(steps)]
        unit = torch.finfo(self.dtype).eps / 2
        return exact, max(_distance(textbook, exact), unit * max(exact))


def _distance(losses: list[float], from_losses: list[float]) -> float:
    """The root of the mean square, over the steps that both have."""
    pairs = list(zip(losses, from_losses))[:CHECKED]
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / len(pairs))


# ---- what is shown


def table(cells: list[Cell], absent: dict[str, str], red: Callable[[str], str]) -> str:
    """Milliseconds of a step, with the kernel that ran."""
    names = list(dict.fromkeys(cell.contestant for cell in cells))
    sets = list(dict.fromkeys(cell.options for cell in cells))
    lines = [["", *sets]]
    plain = {(cell.contestant, cell.options): cell for cell in cells}
    for name in names:
        row = [plain[name, options] for options in sets]
        lines.append([name, *("refused" if c.ms is None else f"{c.ms:.4g} ms" for c in row)])
        lines.append(["", *(c.kernel for c in row)])
        lines.append(["", *("" if c.ms is None else f"loss {c.losses[-1]:.6f}" for c in row)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in lines]
    text += [f"{name}: absent, {why}" for name, why in absent.items()]
    text += [f"{c.contestant}, {c.options}: refused: {c.refused}" for c in cells if c.refused]
    for c in cells:
        if c.ms is not None and not c.agrees:
            text.append(
                red(f"{c.contestant}, {c.options}: its losses are {c.error:.3g} times as far off as the plain ones")
            )
    refused = sum(c.ms is None and c.fails for c in cells)
    if refused:
        text.append(red(f"Fovea refused {refused} of what it was to train"))
    if not any(c.fails for c in cells):
        worst = max(c.error for c in cells if c.error is not None)
        text.append(f"all losses agree: at most {worst:.2f} times as far off as the plain formula's; 2 is the limit")
    return "\n".join(text)


def summary(cells: list[Cell]) -> list[str]:
    """How Fovea stands: what its options cost it, and against the best of the others."""
    lines = []
    for ours in ("Fovea Python", "Fovea C++"):
        mine = {c.options: c.ms for c in cells if c.contestant == ours and c.ms is not None}
        if "none" not in mine:
            continue
        slowest = max(mine, key=lambda options: mine[options])
        lines.append(
            f"{ours}: its slowest set ({slowest}) takes {mine[slowest] / mine['none']:.2f} times the plain one"
        )
        for options, ms in mine.items():
            others = {
                c.contestant: c.ms
                for c in cells
                if c.options == options and c.ms is not None and not c.contestant.startswith("Fovea")
            }
            best = min(others, key=lambda name: others[name])
            lines.append(f"  {options}: {others[best] / ms:.2f} times as fast as {best}, the best of the others")
    return lines


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em; color: #222; }
h2 { font-size: 1em; margin: 1.6em 0 .4em; }
.row { display: grid; grid-template-columns: 8em 1fr; gap: 1em; align-items: center; margin: .25em 0; }
.bar { background: #8d99ae; height: 1.3em; border-radius: 2px; display: inline-block; vertical-align: middle; }
.fovea .bar { background: #d1495b; }
.row span { font-size: .85em; margin-left: .6em; }
.red { color: #c1121f; font-weight: 600; }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto; font-size: .8em; }
@media (prefers-color-scheme: dark) { body { background: #16181d; color: #ddd; } pre { background: #22252c; } }
"""


def page(title: str, cells: list[Cell], text: str) -> str:
    """Bars, one group for each option set, in one HTML file."""
    longest = max(c.ms for c in cells if c.ms is not None)
    body = []
    for options in dict.fromkeys(c.options for c in cells):
        body.append(f"<h2>{html.escape(options)}</h2>")
        for c in (c for c in cells if c.options == options):
            if c.ms is None:
                bar = f"<span>refused: {html.escape(c.refused)}</span>"
            else:
                note = "" if c.agrees else ' <b class="red">its losses do not agree</b>'
                bar = f'<i class="bar" style="width:{55 * c.ms / longest:.2f}%"></i>'
                bar += f"<span>{c.ms:.4g} ms · {html.escape(c.kernel)}{note}</span>"
            kind = " fovea" if c.contestant.startswith("Fovea") else ""
            body.append(f'<div class="row{kind}"><div>{html.escape(c.contestant)}</div><div>{bar}</div></div>')
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>Milliseconds of a training step</h1><p>{title}</p>{''.join(body)}<pre>{html.escape(text)}</pre></html>\n"
    )


def main(words: list[str] | None = None) -> int:
    """The command; 1 where losses do not agree, or Fovea refused."""
    print_everywhere()
    parser = argparse.ArgumentParser(prog="python -m fovea.minitest", description=__doc__.splitlines()[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_option, default=here, help="cpu, cuda or cuda:N")
    parser.add_argument("--steps", type=count_option, default=100)
    parser.add_argument("--size", default="32,500,128", help="batch, length and features; default 32,500,128")
    parser.add_argument("--heads", type=count_option, default=8)
    cpp = "the contestant in C++: fovea_minitest"
    parser.add_argument("--cpp", type=program_option, metavar="PROGRAM", help=cpp)
    parser.add_argument("--json", type=file_option, metavar="FILE", help="write everything there")
    chart = "the bar chart; default %(default)s"
    parser.add_argument("--html", type=file_option, metavar="FILE", default="minitest.html", help=chart)
    arguments = parser.parse_args(words)
    words_of_size = arguments.size.split(",")
    shape = tuple(int(word) for word in words_of_size if word.isdecimal())
    if len(shape) != 3 or len(words_of_size) != 3 or min(shape) < 1:
        parser.error(f"--size ({arguments.size}) must be three numbers above 0")
    if shape[2] % arguments.heads:
        parser.error(f"--heads ({arguments.heads}) must divide the features of --size ({shape[2]})")
    test = Minitest(arguments.device, arguments.steps, shape, arguments.heads, arguments.cpp)
    title = (
        f"{device_name(test.device)}, PyTorch {torch.__version__}, Fovea {fovea.__version__}, input {shape},"
        f" {arguments.heads} heads, {str(test.dtype).removeprefix('torch.')}, {arguments.steps} steps"
    )
    if test.device.type == "cpu":
        title += f", {torch.get_num_threads()} threads"
    print(title + "\n", flush=True)
    shows = sys.stderr.isatty()

    def progress(doing: str, done: int) -> None:
        if shows:
            filled = 30 * done // test.steps
            bar = "█" * filled + "░" * (30 - filled)
            print(f"\r\x1b[K{bar} {100 * done // test.steps:3d} %  {doing}", end="", file=sys.stderr, flush=True)

    cells = test.run(progress)
    if shows:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(table(cells, test.absent, lambda text: f"\x1b[31m{text}\x1b[0m" if colours else text))
    lines = "\n".join(summary(cells))
    print("\n" + lines)
    shown = table(cells, test.absent, str) + "\n\n" + lines
    Path(arguments.html).write_text(page(title, cells, shown), encoding="utf-8")
    print(f"\nthe picture: {Path(arguments.html).resolve().as_uri()}")
    if arguments.json:
        results = {"title": title, "absent": test.absent, "cells": [asdict(cell) for cell in cells]}
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return 1 if any(cell.fails for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main())
