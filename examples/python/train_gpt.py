#!/usr/bin/env python3
"""A small GPT learns English from Python's own language reference, once on PyTorch's N×N formula and once on Fovea.

    python3 train_gpt.py --plot loss.svg                 # 200 steps on the CPU, a few minutes
    python3 train_gpt.py --device cuda --json loss.json

Both start from the same weights and read the same text in the same order.  PyTorch's own fused kernel makes a third
curve: two right ways of computing one formula differ by roundings, which training amplifies, and how far those two are
apart says what noise is.  The script fails where Fovea's curve leaves that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pydoc_data.topics
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fovea._observe import count_option, device_option
from fovea.torch import replace_sdpa


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.think = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, seqlen, dim = x.shape
        q, k, v = self.qkv(self.before(x)).view(batch, seqlen, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, seqlen, dim))
        return x + self.think(self.between(x))


class Gpt(nn.Module):
    def __init__(self, vocabulary: int, dim: int, heads: int, layers: int, seqlen: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(seqlen, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.end = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, vocabulary))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.blocks(self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))))


def train(text: Tensor, vocabulary: int, options: Any, attention: Any) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(0)
    model = Gpt(vocabulary, options.dim, options.heads, options.layers, options.seqlen).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with attention:
        for _ in range(options.steps):
            starts = torch.randint(len(text) - options.seqlen - 1, (options.batch,))
            batch = torch.stack([text[start : start + options.seqlen + 1] for start in starts.tolist()])
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def plot(curves: dict[str, list[float]], path: str) -> None:
    """The curves as a picture, later ones over earlier ones."""
    width, height, margin = 720, 400, 50
    losses = [loss for curve in curves.values() for loss in curve]
    steps = max(1, max(len(curve) for curve in curves.values()) - 1)  # one step makes a point
    top, bottom = max(losses) + 1e-3, min(losses)

    def place(step: float, loss: float) -> str:
        x = margin + (width - 2 * margin) * step / steps
        return f"{x:.1f},{height - margin - (height - 2 * margin) * (loss - bottom) / (top - bottom):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{place(0, top)} L{place(0, bottom)} L{place(steps, bottom)}" fill="none" stroke="#888"/>',
        f'<text x="{width / 2}" y="{height - 15}" text-anchor="middle">step (0 to {steps})</text>',
        f'<text x="8" y="{margin}">{top:.2f}</text><text x="8" y="{height - margin}">{bottom:.2f}</text>',
        f'<text x="8" y="{margin - 20}">loss</text>',
    ]
    styles = (("#1f77b4", 6, ""), ("#9a9a9a", 3, ""), ("#d62728", 1.5, "6 4"))
    for row, ((name, curve), (color, thickness, dashes)) in enumerate(zip(curves.items(), styles)):
        line = " ".join(place(step, loss) for step, loss in enumerate(curve))
        style = f'stroke="{color}" stroke-width="{thickness}" stroke-dasharray="{dashes}"'
        y = margin + 20 * row
        parts.append(f'<polyline points="{line}" fill="none" {style}/>')
        parts.append(f'<path d="M{width - 270},{y - 4} h40" {style}/><text x="{width - 220}" y="{y}">{name}</text>')
    with open(path, "w") as file:
        file.write("\n".join([*parts, "</svg>"]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=lambda word: str(device_option(word)), default="cpu")
    parser.add_argument("--steps", type=count_option, default=200)
    parser.add_argument("--batch", type=count_option, default=16)
    parser.add_argument("--seqlen", type=count_option, default=128)
    parser.add_argument("--dim", type=count_option, default=128)
    parser.add_argument("--heads", type=count_option, default=4)
    parser.add_argument("--layers", type=count_option, default=4)
    parser.add_argument("--plot", metavar="FILE.svg")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.dim % options.heads:
        parser.error(f"--heads ({options.heads}) must divide --dim ({options.dim})")

    text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    letters = sorted(set(text))
    number = {letter: i for i, letter in enumerate(letters)}
    encoded = torch.tensor([number[letter] for letter in text], device=options.device)
    print(
        f"{len(text)} characters of {len(letters)} kinds; {options.steps} steps of {options.batch} × {options.seqlen}"
    )

    replacement = replace_sdpa()
    ways = {
        "PyTorch, N×N formula": sdpa_kernel(SDPBackend.MATH),
        "PyTorch, its own choice": contextlib.nullcontext(),
        "Fovea": replacement,
    }
    curves = {}
    for name, attention in ways.items():
        start = time.perf_counter()
        curves[name] = train(encoded, len(letters), options, attention)
        print(f"{name}: loss {curves[name][0]:.4f} → {curves[name][-1]:.4f} in {time.perf_counter() - start:.1f} s")
    print(replacement)

    formula, fused, ours = (torch.tensor(curve) for curve in curves.values())
    noise, apart = (fused - formula).abs().max().item(), (ours - formula).abs().max().item()
    print(f"largest distance to the formula's curve: PyTorch's own choice {noise:.1e}, Fovea {apart:.1e}")
    if options.plot:
        plot(curves, options.plot)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": options.device, "noise": noise, "apart": apart, "curves": curves}, file)
    if replacement.left.total():
        sys.exit("train_gpt.py: some attention did not run on Fovea")
    if not apart <= max(3 * noise, 1e-3):
        sys.exit("train_gpt.py: Fovea's curve is further from the formula's than noise")


if __name__ == "__main__":
    main()
