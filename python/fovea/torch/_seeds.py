"""Dropout seeds out of PyTorch's default generators, so that manual_seed, get_rng_state and checkpointing rule them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

_OFFSET_STEP = 4  # a CUDA generator counts its offset in groups of four draws


class Drawn(NamedTuple):
    """A seed for several calls of fovea.torch's attention, which takes it as seed.

    It is what the operator gives that draws one: in a graph no number, so that no trace keeps it.
    """

    tensor: torch.Tensor


def draw(device: torch.device) -> tuple[int, int]:
    """(seed, offset) for one call, from the default generator of that device; the generator moves on.

    On a GPU the generator's state is two numbers on the host: nothing waits for the GPU.
    """
    if device.type != "cuda":
        return int(torch.empty((), dtype=torch.int64, device="cpu").random_().item()), 0
    generator = _of_gpu(device)
    offset = generator.get_offset()
    generator.set_offset(offset + _OFFSET_STEP)
    return generator.initial_seed() % 2**64, offset


@contextmanager
def taken_back(device: torch.device) -> Iterator[None]:
    """Puts the generator of `draw` back to where it was if what runs inside raises."""
    on_gpu = device.type == "cuda"
    generator = _of_gpu(device) if on_gpu else torch.default_generator
    state = generator.get_offset() if on_gpu else generator.get_state()
    try:
        yield
    except BaseException:
        (generator.set_offset if on_gpu else generator.set_state)(state)
        raise


def _of_gpu(device: torch.device) -> torch.Generator:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dropout inside a CUDA graph would drop the same entries in every replay; give seed= to say that this is"
            " wanted, or leave dropout out of the graph"
        )
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def to_tensor(seed: int, offset: int) -> torch.Tensor:
    """Both numbers as one int64 tensor on the CPU, their bits kept: how seeds travel through graphs."""
    return torch.tensor([_signed(seed), _signed(offset)], dtype=torch.int64, device="cpu")


def from_tensor(seed: torch.Tensor) -> tuple[int, int]:
    """What `to_tensor` was given."""
    first, second = seed.tolist()
    return first % 2**64, second % 2**64


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
