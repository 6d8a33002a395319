"""The compiled half; what users call stands in fovea and its submodules."""

from collections.abc import Sequence
from typing import Any

__version__: str

class Rules:
    """The options of a call that are not tensors, checked once."""

    def __init__(
        self,
        softmax_scale: float | None,
        causal: str | None,
        window_left: int | None,
        window_right: int | None,
        softcap: float,
        dropout_p: float,
        deterministic: bool,
        layout: str,
        backend: str | None,
        strict: bool,
    ) -> None: ...

class Report:
    """Who runs a call, how, and why the others do not; str() prints it."""

    @property
    def problem(self) -> str:
        """The problem as one line of text, which the fovea command takes."""

    @property
    def device(self) -> str:
        """'cpu', 'cuda:0'."""

    @property
    def backend(self) -> str:
        """Who runs it; '' where nobody does."""

    @property
    def details(self) -> list[tuple[str, str]]:
        """Pairs: instruction set, tiles, threads, ..."""

    @property
    def workspace_bytes(self) -> int:
        """Memory besides inputs and outputs."""

    @property
    def reasons(self) -> dict[str, list[str]]:
        """For every backend asked, in order of preference, why it would not run the call; [] if it would."""

class Outline:
    """An array without data, by what DLPack would say of it."""

    def __init__(
        self,
        shape: Sequence[int],
        strides: Sequence[int],
        type_code: int,
        type_bits: int,
        device_type: int,
        device_index: int,
    ) -> None: ...

def check(q: Any, k: Any, v: Any, extras: tuple[Any, ...] | None, rules: Rules, out: Any) -> None: ...
def forward(
    q: Any,
    k: Any,
    v: Any,
    extras: tuple[Any, ...] | None,
    rules: Rules,
    seed: int | None,
    offset: int,
    want_lse: bool,
    out: Any,
) -> Any: ...
def regular(q: Any, k: Any, v: Any) -> bool: ...
def forward_regular(q: Any, k: Any, v: Any, rules: Rules) -> Any: ...
def backward(
    dout: Any,
    dlse: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    extras: tuple[Any, ...] | None,
    rules: Rules,
    seed: int | None,
    offset: int,
    wanted: int,
) -> tuple[Any, ...]: ...
def forward_projected(
    q: Any,
    kv: Any,
    heads: int,
    batch_first: bool,
    extras: tuple[Any, ...] | None,
    rules: Rules,
    seed: int | None,
    offset: int,
) -> tuple[Any, Any]: ...
def backward_projected(
    dout: Any,
    q: Any,
    kv: Any,
    out: Any,
    lse: Any,
    heads: int,
    batch_first: bool,
    extras: tuple[Any, ...] | None,
    rules: Rules,
    seed: int | None,
    offset: int,
) -> tuple[Any, Any]: ...
def forward_layer(
    query: Any,
    key: Any,
    in_weight: Any,
    in_bias: Any,
    out_weight: Any,
    out_bias: Any,
    heads: int,
    batch_first: bool,
    extras: tuple[Any, ...] | None,
    rules: Rules,
    seed: int | None,
    offset: int,
    index: Any,
) -> tuple[Any, ...] | None: ...
def backward_layer(
    dy: Any,
    query: Any,
    key: Any,
    in_weight: Any,
    out_weight: Any,
    q: Any,
    kv: Any,
    out: Any,
    lse: Any,
    heads: int,
    batch_first: bool,
    extras: tuple[Any, ...] | None,
    rules: Rules,
    seed: int | None,
    offset: int,
    index: Any,
    wanted: int,
) -> tuple[Any, ...] | None: ...
def why_no_layer(gpu: int) -> str: ...
def pack(ignore: Any) -> tuple[Any, int, int, int]: ...
def xla_handlers() -> tuple[Any, Any]: ...
def explain(backward: bool, q: Any, k: Any, v: Any, extras: tuple[Any, ...] | None, rules: Rules) -> Report: ...
