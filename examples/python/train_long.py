#!/usr/bin/env python3
"""Training on long sequences: a stack of encoder layers learns real text byte by byte, on torch.nn's layers and Fovea's.

    python3 train_long.py --plot memory.svg                    # on the CPU, up to 8,192 bytes
    python3 train_long.py --device cuda --json long.json       # up to 65,536
    python3 train_long.py --device cuda --cpp build/release/examples/train_long/train_long

The text is Python's own language reference, whose topics are the documents. Dropout is 0.1, and a byte sees what stands
before it in its own document. torch.nn's layers are told so by a mask, length × length; Fovea's by the same mask
("Fovea, mask"), and by where documents end ("Fovea"): then memory grows with the length, not with its square. Each is
stopped where it runs out of memory. Fails where the layers' losses without dropout differ, or where Fovea's memory
grows faster than the length.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fovea.nn
from fovea._observe import count_option, device_option, program_option

END = 12  # a form feed ends a document
LIMITS = {"torch.nn": 32768, "Fovea, mask": 32768, "Fovea": 65536}  # lengths beyond are not tried: masks of gigabytes
GROWTH = 1.1  # of bytes for a token, from one length to the next that is twice as long


class Model(nn.Module):
    """Bytes in, what follows each of them out."""

    def __init__(self, options: argparse.Namespace, library: Any) -> None:
        super().__init__()
        layer = library.TransformerEncoderLayer(
            options.width, options.heads, 4 * options.width, 0.1, "gelu", batch_first=True, norm_first=True
        )
        self.embedding, self.head = nn.Embedding(256, options.width), nn.Linear(options.width, 256)
        self.encoder = library.TransformerEncoder(layer, options.layers, enable_nested_tensor=False)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [length, 256]."""
        x = self.embedding(batch.bytes) + batch.places(self.embedding.embedding_dim).to(self.embedding.weight.dtype)
        if batch.mask is not None:
            return self.head(self.encoder(x[None], mask=batch.mask)[0])
        documents = torch.nested.nested_tensor_from_jagged(
            x, batch.ends, min_seqlen=batch.shortest, max_seqlen=batch.longest
        )
        return self.head(self.encoder(documents, is_causal=True).values())


class Batch:
    """A piece of the text, with its documents as a mask or as their ends."""

    def __init__(self, text: Tensor, step: int, length: int, masked: bool, device: str) -> None:
        place = torch.arange(step * length, (step + 1) * length) % len(text)
        piece = text[place]
        last = piece == END
        last[-1] = True
        ends = F.pad(last.nonzero().flatten() + 1, (1, 0))
        lengths = ends.diff()
        self.shortest, self.longest, self.documents = int(lengths.min()), int(lengths.max()), len(lengths)
        self.bytes, self.ends = piece.to(device), ends.to(device)
        self.next = torch.where(last, -100, text[(place + 1) % len(text)]).to(device)
        document = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
        self.position = torch.arange(length, device=device) - self.ends[document]
        self.mask = None
        if masked:
            self.mask = torch.ones(length, length, dtype=torch.bool, device=device).triu_(1)
            self.mask |= document[:, None] != document[None]

    def places(self, width: int) -> Tensor:
        """Sines of the positions [length, width], by which bytes are told apart."""
        steps = torch.exp(torch.arange(0, width, 2, device=self.position.device) * (-math.log(10000.0) / width))
        angles = self.position[:, None] * steps
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)

    def loss(self, logits: Tensor) -> Tensor:
        """Of the bytes that have a next one."""
        return F.cross_entropy(logits.float(), self.next)


def text_bytes() -> bytes:
    """Topics one behind the other, each with its end."""
    return "\f".join(topic for _, topic in sorted(pydoc_data.topics.topics.items())).encode()


def model_of(contestant: str, options: argparse.Namespace) -> Model:
    torch.manual_seed(0)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    return Model(options, nn if contestant == "torch.nn" else fovea.nn).to(options.device, dtype)


def measure(contestant: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step and the most bytes held, over what stood there before."""
    gpu = options.device != "cpu"
    text = torch.frombuffer(bytearray(text_bytes()), dtype=torch.uint8).long()
    result: dict[str, Any] = {"contestant": contestant, "length": length}
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the most memory so far
    before = 0 if gpu else memory_of_process("VmRSS")
    try:
        model = model_of(contestant, options)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
        times, losses = [], []
        for step in range(options.steps + 1):  # the first is a rehearsal
            batch = Batch(text, step, length, contestant != "Fovea", options.device)
            if gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            loss = batch.loss(model(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())  # waits for the GPU
            times.append(1e3 * (time.perf_counter() - start))
        result |= {"ms": statistics.median(times[1:]), "losses": losses, "documents": batch.documents}
    except torch.OutOfMemoryError as error:
        result["refused"] = "out of memory: " + str(error).split(". ")[0]
    peak = torch.cuda.max_memory_allocated() if gpu else memory_of_process("VmHWM")
    return result | {"peak_bytes": peak - before}


def memory_of_process(which: str) -> int:
    """Bytes of Linux's VmRSS, now, or VmHWM, the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024


def measured_apart(contestant: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """The same; on a CPU in a process of its own, whose memory tells."""
    if options.device != "cpu":
        return measure(contestant, length, options)
    words = [f"--{name}={getattr(options, name)}" for name in ("device", "steps", "layers", "width", "heads")]
    command = [sys.executable, __file__, *words, "--one", contestant, "--lengths", str(length)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def losses_agree(options: argparse.Namespace) -> bool:
    """Without dropout, on the shortest length."""
    text = torch.frombuffer(bytearray(text_bytes()), dtype=torch.uint8).long()
    losses = {}
    for contestant in LIMITS:
        batch = Batch(text, 0, min(options.lengths), contestant != "Fovea", options.device)
        with torch.no_grad():
            losses[contestant] = batch.loss(model_of(contestant, options).eval()(batch)).item()
    print("losses without dropout: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    tolerance = 1e-5 if options.device == "cpu" else 1e-2
    numbers = torch.tensor(list(losses.values()), dtype=torch.float64)  # whose max is NaN where one is
    return bool(numbers.max() - numbers.min() <= tolerance * numbers.max())


def grows_linearly(results: list[dict[str, Any]]) -> bool:
    """Whether a token of Fovea's takes no more memory in long sequences than in short ones."""
    tokens = [r["peak_bytes"] / r["length"] for r in results if r["contestant"] == "Fovea" and "ms" in r]
    return all(after <= GROWTH * before for before, after in zip(tokens, tokens[1:]))


def in_cpp(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The C++ example's own report, on the same text."""
    from fovea.minitest import cpp_environment

    with tempfile.TemporaryDirectory() as folder:
        text, report = Path(folder) / "text", Path(folder) / "report.json"
        text.write_bytes(text_bytes())
        words = [f"--lengths={','.join(map(str, options.lengths))}", f"--device={options.device}", f"--json={report}"]
        words += [f"--{name}={getattr(options, name)}" for name in ("steps", "layers", "width", "heads")]
        pairs = [part for word in words for part in word.split("=", 1)]
        subprocess.run([options.cpp, str(text), *pairs], check=True, env=cpp_environment())
        return [{"contestant": "Fovea C++"} | entry for entry in json.loads(report.read_text())]


def plot(results: list[dict[str, Any]], path: str) -> None:
    """Most memory over length, a line for each contestant."""
    width, height, margin = 720, 400, 60
    done = [r for r in results if "ms" in r]
    longest, most = max(r["length"] for r in done), max(r["peak_bytes"] for r in done)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{margin},{margin} V{height - margin} H{width - margin}" fill="none" stroke="#888"/>',
        f'<text x="{width / 2}" y="{height - 20}" text-anchor="middle">length of the sequence (to {longest:,})</text>',
        f'<text x="{margin}" y="{margin - 15}">most memory (to {most / 2**30:.2f} GiB)</text>',
    ]
    names = dict.fromkeys(r["contestant"] for r in done)
    for row, (name, color) in enumerate(zip(names, ("#888", "#e9a13b", "#d1495b", "#1f77b4"))):
        points = " ".join(
            f"{margin + (width - 2 * margin) * r['length'] / longest:.1f},"
            f"{height - margin - (height - 2 * margin) * r['peak_bytes'] / most:.1f}"
            for r in done
            if r["contestant"] == name
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        parts.append(f'<text x="{margin + 15}" y="{margin + 15 + 20 * row}" fill="{color}">{name}</text>')
    Path(path).write_text("\n".join([*parts, "</svg>"]) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=lambda word: str(device_option(word)), default="cpu")
    lengths = "with commas between; default 2048 to 8192 on a CPU, to 65536 on a GPU"
    parser.add_argument("--lengths", type=lambda words: [count_option(w) for w in words.split(",")], help=lengths)
    parser.add_argument("--steps", type=count_option, default=4)
    parser.add_argument("--layers", type=count_option, default=2)
    parser.add_argument("--width", type=count_option, default=512)
    parser.add_argument("--heads", type=count_option, default=8)
    parser.add_argument("--cpp", type=program_option, metavar="PROGRAM", help="the C++ example, train_long, besides")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE.svg")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    longest = 8192 if options.device == "cpu" else 65536
    doubling = [2048 << i for i in range(6) if 2048 << i <= longest]
    options.lengths = options.lengths or doubling
    if options.width % options.heads or options.width % 2:
        parser.error(f"--width ({options.width}) must be even, and --heads ({options.heads}) divide it")
    if options.one:
        print(json.dumps(measure(options.one, options.lengths[0], options)))
        return 0

    agree = losses_agree(options)
    print(f"\n{'':12}  {'length':>7}  {'a step':>11}  {'most memory':>12}  {'a token':>9}   over torch.nn")
    results: list[dict[str, Any]] = []
    for length in options.lengths:
        for contestant in (name for name, limit in LIMITS.items() if length <= limit):
            r = measured_apart(contestant, length, options)
            results.append(r)
            if "ms" not in r:
                print(f"{contestant:12}  {length:7}  {r['refused']}", flush=True)
                continue
            peers = [p["ms"] for p in results if p["contestant"] == "torch.nn" and p["length"] == length and "ms" in p]
            faster = f"{peers[0] / r['ms']:5.2f} times as fast" if peers and contestant != "torch.nn" else ""
            memory = f"{r['peak_bytes'] / 2**20:8.1f} MiB  {r['peak_bytes'] / 2**10 / length:5.1f} KiB"
            print(f"{contestant:12}  {length:7}  {r['ms']:8.1f} ms  {memory}   {faster}", flush=True)
    linear = grows_linearly(results)
    if options.cpp:
        print("\nFovea C++:")
        results += in_cpp(options)
    growth = "grows" if linear else "DOES NOT GROW"
    print(f"\nlosses {'agree' if agree else 'DO NOT AGREE'}; Fovea's memory {growth} linearly")
    if options.json:
        device = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
        facts = {"device": device, "torch": torch.__version__, "fovea": fovea.__version__}
        facts |= {name: getattr(options, name) for name in ("steps", "layers", "width", "heads")}
        facts |= {"losses_agree": agree, "linear": linear, "results": results}
        Path(options.json).write_text(json.dumps(facts, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)
    return 0 if agree and linear else 1


if __name__ == "__main__":
    sys.exit(main())
