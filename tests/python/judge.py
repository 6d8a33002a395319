"""The error rule of docs/contract.md for results that come from the Python package.

`Judged` gives a problem's hostile tensors, as PyTorch tensors over the memory of judge.cpp, and its verdict.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int32)
INPUTS = (
    "q", "k", "v", "mask", "bias", "alibi_slopes", "sink", "q_lengths", "kv_lengths", "cu_seqlens_q", "cu_seqlens_kv",
    "dout", "dlse",
)  # fmt: skip
GRADIENTS = {"dq": "q", "dk": "k", "dv": "v", "dbias": "bias", "dalibi_slopes": "alibi_slopes", "dsink": "sink"}
MOST_RATIO = 2.0


class _View(ctypes.Structure):
    """fovea_tensor of include/fovea/c.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("device", ctypes.c_int32 * 3),
        ("shape", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
    ]


def _load() -> ctypes.CDLL:
    default = Path(__file__).resolve().parents[2] / "build/release/tests/libfovea_judge.so"
    library = ctypes.CDLL(os.environ.get("FOVEA_JUDGE", str(default)))
    library.judge_open.restype = ctypes.c_void_p
    library.judge_open.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    library.judge_close.argtypes = [ctypes.c_void_p]
    library.judge_error.restype = ctypes.c_char_p
    library.judge_line.restype = ctypes.c_char_p
    library.judge_line.argtypes = [ctypes.c_void_p]
    library.judge_tensor.restype = ctypes.c_bool
    library.judge_tensor.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_View)]
    library.judge_result.restype = ctypes.c_double
    library.judge_result.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_View)]
    return library


_library = _load()


class Judged:
    """A problem line, or a random problem, with its tensors and its judge."""

    def __init__(self, seed: int, line: str = "") -> None:
        self._handle = _library.judge_open(line.encode(), seed)
        if not self._handle:
            raise ValueError(_library.judge_error().decode())
        self.line = _library.judge_line(self._handle).decode()
        words = self.line.split()
        self.backward = "bwd" in words[0]
        self.tokens = dict(word.partition("=")[::2] for word in words[2:])
        self.inputs = {name: tensor for name in INPUTS if (tensor := self._tensor(name)) is not None}
        self.wanted = {name for name in ("out", "lse", *GRADIENTS) if self._tensor(name) is not None}

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            _library.judge_close(self._handle)

    def options(self) -> dict[str, Any]:
        """The line's options as fovea.attention takes them."""
        tokens, options = self.tokens, {}
        if "causal" in tokens:
            options["causal"] = tokens["causal"]
        if "window" in tokens:
            left, right = (None if side == "-" else int(side) for side in tokens["window"].split(","))
            options.update(window_left=left, window_right=right)
        for token, name, kind in (
            ("softcap", "softcap", float),
            ("scale", "softmax_scale", float),
            ("dropout", "dropout_p", float),
            ("seed", "seed", int),
            ("offset", "offset", int),
        ):
            if token in tokens:
                options[name] = kind(tokens[token])
        if "dropout" in tokens:
            options.setdefault("seed", 0)
        options["deterministic"] = "deterministic" in tokens
        return options

    def failures(self, results: dict[str, torch.Tensor]) -> list[str]:
        """A sentence for every result that breaks the rule."""
        sentences = []
        for name, tensor in results.items():
            ratio = self.ratio(name, tensor)
            if not ratio <= MOST_RATIO:
                sentences.append(f"{self.line}: {_library.judge_error().decode() or f'{name}: {ratio}'}")
        return sentences

    def ratio(self, name: str, tensor: torch.Tensor) -> float:
        """The error over that of its peers."""
        expected = self._tensor(name)
        assert tensor.dtype == expected.dtype, (self.line, name, tensor.dtype, expected.dtype)
        assert tensor.shape == expected.shape, (self.line, name, tensor.shape, expected.shape)
        tensor = tensor.detach()
        view = _View(data=tensor.data_ptr(), dtype=DTYPES.index(tensor.dtype), rank=tensor.dim())
        view.strides[: tensor.dim()] = tensor.stride()
        return _library.judge_result(self._handle, name.encode(), ctypes.byref(view))

    def _tensor(self, name: str) -> torch.Tensor | None:
        view = _View()
        if not _library.judge_tensor(self._handle, name.encode(), ctypes.byref(view)):
            return None
        shape, strides, dtype = view.shape[: view.rank], view.strides[: view.rank], DTYPES[view.dtype]
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        reach = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides))
        memory = (ctypes.c_byte * (reach * dtype.itemsize)).from_address(view.data)
        return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)
