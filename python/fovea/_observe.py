"""What ran, and where: for the programs that set PyTorch and Fovea side by side."""

from __future__ import annotations

import argparse
import io
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def torch_kernel(call: Callable[[], Any]) -> str:
    """Which of PyTorch's paths takes a call: a fused operator by its name, else the formula's own operators."""
    with Operators() as seen:
        try:
            call()
        except (RuntimeError, NotImplementedError):
            return "none"
    fused = [name for name in seen.names if name.startswith("_") and "attention" in name]
    return ", ".join(dict.fromkeys(name.removeprefix("_scaled_dot_product_") for name in fused)) or "N×N formula"


def device_name(device: torch.device) -> str:
    """The model of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_everywhere() -> None:
    """Lets a sign that the terminal's encoding lacks be printed as "?", rather than end all in an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def device_option(word: str) -> torch.device:
    """--device of a command line: one that is there."""
    try:
        device: torch.device | None = torch.device(word)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{word!r} must be cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"{word!r} is not there: PyTorch sees {count} GPUs; give cpu, or one of them")
    return device


def count_option(word: str) -> int:
    """A number of a command line: nothing is measured of none."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} must be a whole number above 0")
    return int(word)


def program_option(word: str) -> str:
    """A program that a command line asks to run beside."""
    found = shutil.which(word)
    if found is None:
        raise argparse.ArgumentTypeError(f"{word!r} is no program; name a file that is there and may be run")
    return found


def file_option(word: str) -> str:
    """A file of a command line that is written in the end: better refused now than after all has been measured."""
    file = Path(word)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{word!r} cannot be written; name a file in a folder that is there")
    return word
