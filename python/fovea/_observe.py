"""What ran, and where: for the programs that set PyTorch and Fovea side by side."""

from __future__ import annotations

import platform
from collections.abc import Callable
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
