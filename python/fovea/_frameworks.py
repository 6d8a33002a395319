"""Arrays of frameworks without DLPack's exchange ABI: how to export and make them, and their current stream.

Called by the compiled half for types that it cannot read directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Adapter(Protocol):
    """What the compiled half needs of a framework."""

    def export(self, array: Any) -> Any:
        """A DLPack capsule of the array, ordered after the work of the current stream."""

    def make(self, dims: Sequence[int], axes: Sequence[int], dtype: str, device: str) -> Any:
        """A new array on "cpu" or "cuda:0", dense as `dims`, then with its axes permuted to `axes`."""

    def stream(self, device: str) -> int:
        """The current CUDA stream there, as a number."""


class _Dtypes(dict[str, Any]):
    """A framework's dtypes by Fovea's names."""

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"the result is {name}, which arrays of this kind cannot hold; give PyTorch's or JAX's arrays")


class _NumPy:
    def __init__(self) -> None:
        import numpy

        self._numpy = numpy
        self._dtypes = _Dtypes(fp32=numpy.float32, fp16=numpy.float16, int32=numpy.int32, bool=numpy.bool_)

    def export(self, array: Any) -> Any:
        try:
            return array.__dlpack__(max_version=(1, 0))
        except TypeError:  # NumPy before 2.1
            return array.__dlpack__()

    def make(self, dims: Sequence[int], axes: Sequence[int], dtype: str, device: str) -> Any:
        return self._numpy.empty(dims, self._dtypes[dtype]).transpose(axes)

    def stream(self, device: str) -> int:
        raise RuntimeError("NumPy arrays are on the CPU, which has no streams")


class _CuPy:
    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._dtypes = _Dtypes(fp32=cupy.float32, fp16=cupy.float16, int32=cupy.int32, bool=cupy.bool_)

    def export(self, array: Any) -> Any:
        # CuPy's current stream, which will read the array.
        return array.__dlpack__(stream=self.stream(f"cuda:{array.device.id}") or 1)

    def make(self, dims: Sequence[int], axes: Sequence[int], dtype: str, device: str) -> Any:
        with self._cupy.cuda.Device(int(device[len("cuda:") :])):
            return self._cupy.empty(dims, self._dtypes[dtype]).transpose(axes)

    def stream(self, device: str) -> int:
        with self._cupy.cuda.Device(int(device[len("cuda:") :])):
            return int(self._cupy.cuda.get_current_stream().ptr)


class _Torch:
    """PyTorch before 2.10."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._dtypes = {
            "fp32": torch.float32,
            "fp16": torch.float16,
            "bf16": torch.bfloat16,
            "int32": torch.int32,
            "bool": torch.bool,
        }

    def export(self, array: Any) -> Any:
        return self._torch.utils.dlpack.to_dlpack(array.detach())

    def make(self, dims: Sequence[int], axes: Sequence[int], dtype: str, device: str) -> Any:
        return self._torch.empty(dims, dtype=self._dtypes[dtype], device=device).permute(axes)

    def stream(self, device: str) -> int:
        return int(self._torch.cuda.current_stream(device).cuda_stream)


class _Other:
    """Reads what speaks DLPack on the CPU; results are NumPy's."""

    def __init__(self) -> None:
        self._numpy = _NumPy()
        self.make = self._numpy.make
        self.stream = self._numpy.stream

    def export(self, array: Any) -> Any:
        try:
            device_type, _ = array.__dlpack_device__()
        except AttributeError:  # JAX's that are being traced, whose types promise it
            kind = type(array).__name__
            raise BufferError(f"a {kind} has no memory yet; call outside of jit and other transforms") from None
        if device_type != 1:
            raise ValueError(f"{type(array).__name__} on a GPU is no array of PyTorch, CuPy or JAX; convert it to one")
        return array.__dlpack__()


def refuse_masked(array_type: type) -> None:
    """Refuses masked arrays: DLPack carries their numbers without the mask."""
    if any(base.__name__ == "MaskedArray" for base in array_type.__mro__):
        name = array_type.__name__
        raise ValueError(f"a {name} has a mask that Fovea does not read; give its data, and hide keys by mask=")


def adapter(array_type: type, name: str) -> Adapter:
    """The adapter for arrays of this type; ValueError where it does not speak DLPack, or not for all that it holds.

    Args:
        array_type: of an array that has not been met yet.
        name: the array's.
    """
    refuse_masked(array_type)
    if not hasattr(array_type, "__dlpack__"):
        raise ValueError(
            f"{name} is a {array_type.__name__}, which is no array:"
            " give one that speaks DLPack (PyTorch, NumPy, CuPy, JAX)"
        )
    roots = {base.__module__.partition(".")[0] for base in array_type.__mro__}
    for root, make in (("numpy", _NumPy), ("cupy", _CuPy), ("torch", _Torch)):
        if root in roots:
            return make()
    return _Other()
