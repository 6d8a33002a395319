"""The package from outside: what the benchmark prints, what is typed, and XLA's layouts."""

from __future__ import annotations

import ast
import ctypes
import importlib.resources
import inspect
import json
import os
import runpy
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import jax
import pytest

import fovea.bench
import fovea.minitest

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_prints_a_row_for_every_case_and_writes_json(tmp_path):
    file = tmp_path / "bench.json"
    arguments = ["--batch", "2", "--heads", "2", "--seqlen", "64", "--dim", "16", "--repeats", "1", "--json", str(file)]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fovea.bench", "--device", "cpu", *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},  # a terminal may lack some signs
    )
    results = json.loads(file.read_text())
    cases = [row["case"] for row in results["rows"]]
    assert {"plain", "causal", "boolean mask", "padding", "bias with gradient", "dropout", "dropout + mask"} < set(
        cases
    )
    assert {"bf16", "head dim 96", "head dim 256", "ragged batch"} < set(cases)
    for row in results["rows"]:
        assert row["case"] in run.stdout and row["fovea"]["refused"] is None and row["fovea"]["backward_ms"] > 0
        assert row["fovea"]["kernel"].startswith("cpu_")
        assert row["difference"] is None or row["difference"] < (0.05 if row["dtype"] == "bfloat16" else 1e-4)
    by_case = {row["case"]: row["torch"]["kernel"] for row in results["rows"]}
    assert by_case["plain"] == "flash_attention_for_cpu" and by_case["dropout"] == "N×N formula"


@pytest.mark.parametrize(
    "option, word, sentence",
    [
        ("--repeats", "0", "'0' must be a whole number above 0"),
        ("--heads", "0", "'0' must be a whole number above 0"),
        ("--seqlen", "0", "'0' must be a whole number above 0"),
        ("--device", "cuda:99", "'cuda:99' is not there: PyTorch sees "),
        ("--device", "meta", "'meta' must be cpu, cuda or cuda:N"),
        ("--device", "gpu", "'gpu' must be cpu, cuda or cuda:N"),
        ("--json", "nowhere/b.json", "'nowhere/b.json' cannot be written; name a file in a folder that is there"),
        ("--json", ".", "'.' cannot be written"),
    ],
)
def test_what_cannot_be_measured_or_written_is_refused_before(option, word, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fovea.bench", option, word])
    for command in (fovea.bench.main, fovea.minitest.main) if option in ("--device", "--json") else (fovea.bench.main,):
        with pytest.raises(SystemExit) as left:
            command()
        assert left.value.code == 2 and f"argument {option}: {sentence}" in capsys.readouterr().err


def test_the_benchmark_goes_on_where_fovea_refuses(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", "fovea.bench --device cpu --batch 1 --heads 1 --seqlen 16 --dim 600 --repeats 1".split()
    )
    fovea.bench.main()
    assert "plain: fovea refused: head_dim (600) must be at most 512" in capsys.readouterr().out


@pytest.mark.parametrize("first, second", [("fovea", "torch"), ("torch", "fovea")])
def test_the_first_call_may_be_compiled_whatever_was_imported_first(first, second):
    program = f"""
import {first}
import {second}
q = torch.nn.Parameter(torch.randn(1, 5, 2, 8))
call = torch.compile(lambda q: fovea.attention(q, q, q), fullgraph=True, backend="aot_eager")
assert torch.equal(call(q), fovea.attention(q, q, q)) and torch.equal(call(q), fovea.attention(q, q, q))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_a_process_may_forbid_pytorch():
    program = """
import sys
sys.modules["torch"] = None
import fovea, numpy
fovea.attention(*[numpy.ones((1, 3, 1, 8), numpy.float32)] * 3)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_without_pytorch_there_is_no_fovea_torch():
    program = """
import sys
sys.modules["torch"] = None
import fovea
assert not hasattr(fovea, "torch") and getattr(fovea, "flash_attn", None) is None
try:
    fovea.nn
except AttributeError as error:
    assert "fovea.nn needs the package torch" in str(error)
for words in ("import fovea.torch", "from fovea import torch"):
    try:
        exec(words)
    except ModuleNotFoundError:
        pass
    else:
        sys.exit(words)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


@pytest.mark.parametrize(
    "script, words, sentence",
    [
        ("examples/python/train_long.py", "--lengths 0", "argument --lengths: '0' must be a whole number above 0"),
        ("examples/python/train_long.py", "--heads 3 --width 16", "--width (16) must be even, and --heads (3) divide"),
        ("examples/python/train_long.py", "--device cuda:99", "'cuda:99' is not there: PyTorch sees "),
        ("examples/python/train_gpt.py", "--steps 0", "argument --steps: '0' must be a whole number above 0"),
        ("examples/python/train_gpt.py", "--heads 3", "--heads (3) must divide --dim (128)"),
        ("bench/peers_cpu.py", "--lib /nolib", "--lib (/nolib) is not there; begin with `"),
        ("bench/peers_cpu.py", "--program /nothing", "--program (/nothing) is not there; begin with `./dev build`"),
    ],
)
def test_programs_beside_the_package_refuse_in_one_sentence(script, words, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, *words.split()])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert left.value.code == 2 and sentence in capsys.readouterr().err


def test_importing_everything_takes_nobody_s_name_and_needs_no_other_framework():
    program = """
import sys
sys.modules["jax"] = None
import torch
from fovea import *
assert torch.__name__ == "torch" and attention and explain
import fovea
assert {"torch", "jax", "nn", "flash_attn"} <= set(dir(fovea))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_the_compiled_half_lends_the_library_to_nobody_and_borrows_nobody_s():
    module = ctypes.CDLL(fovea._core.__file__)
    assert module.PyInit__core
    with pytest.raises(AttributeError):  # what is visible would be taken from a program's own libfovea first
        _ = module["_ZN5fovea12plan_forwardERKNS_7ProblemERKNS_6DeviceERKNS_11PlanOptionsE"]


def test_every_adapter_takes_the_arguments_in_one_order():
    from fovea import _arguments, _arrays
    from fovea.torch import _adapter

    for function in (fovea.attention, _arrays.attention, _adapter.attention):
        assert tuple(inspect.signature(function).parameters) == ("q", "k", "v", *_arguments.KEYWORDS)


@pytest.mark.parametrize(
    "function, options, array",
    [(fovea.attention, fovea._Options, "_Array"), (fovea.jax.attention, fovea.jax._attention._Options, "jax.Array")],
)
def test_results_are_typed_as_the_arrays_given_whatever_the_options(function, options, array):
    parameters = inspect.signature(function).parameters.values()
    keywords = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords.pop("return_lse") == "bool"
    assert {name: hint.__forward_arg__ for name, hint in options.__annotations__.items()} == keywords
    hints = [overload.__annotations__ for overload in typing.get_overloads(function)]
    assert all(h[name] == array for h in hints for name in "qkv")
    pair = f"tuple[{array}, {array}]"
    returns = {"Literal[False]": array, "Literal[True]": pair, "bool": f"{array} | {pair}"}
    assert {h["return_lse"]: h["return"] for h in hints} == returns


def test_layers_are_constructed_as_torch_s_are_for_those_who_check_types():
    source = importlib.resources.files("fovea.nn").joinpath("_encoder.py").read_text()
    layers = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    assert len(layers) == 2
    for layer in layers:  # what stands under TYPE_CHECKING is no part of the class itself
        assert "__init__" not in [part.name for part in layer.body if isinstance(part, ast.FunctionDef)]


def test_types_and_documentation_come_along():
    files = importlib.resources.files("fovea")
    assert files.joinpath("py.typed").is_file() and files.joinpath("_core.pyi").is_file()
    for function in (fovea.attention, fovea.explain, fovea.torch.scaled_dot_product_attention, fovea.jax.attention):
        for word in (
            "Args:",
            "Raises:",
            "batch" if function is not fovea.torch.scaled_dot_product_attention else "num_q_heads",
        ):
            assert word in function.__doc__
    assert all(f"``fovea.{submodule}``" in fovea.__doc__ for submodule in fovea._SUBMODULES)
    assert fovea.__version__ in (ROOT / "include/fovea/version.h").read_text()
    assert f'version = "{fovea.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_what_is_declared_of_xla_is_laid_out_as_xla_lays_it_out(tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    pairs = {
        "CallFrame": (
            "XLA_FFI_CallFrame",
            {"api": "api", "context": "ctx", "arguments": "args", "attributes": "attrs"},
        ),
        "Buffers": ("XLA_FFI_Args", {"count": "size", "buffers": "args"}),
        "Attributes": ("XLA_FFI_Attrs", {"names": "names", "values": "attrs"}),
        "Buffer": ("XLA_FFI_Buffer", {"dtype": "dtype", "data": "data", "rank": "rank", "dims": "dims"}),
        "Span": ("XLA_FFI_ByteSpan", {"data": "ptr", "length": "len"}),
        "Api": (
            "XLA_FFI_Api",
            {
                "version": "api_version",
                "error_create": "XLA_FFI_Error_Create",
                "stream_get": "XLA_FFI_Stream_Get",
                "memory_allocate": "XLA_FFI_DeviceMemory_Allocate",
                "memory_free": "XLA_FFI_DeviceMemory_Free",
                "ordinal_get": "XLA_FFI_DeviceOrdinal_Get",
            },
        ),
        "ErrorCreate": ("XLA_FFI_Error_Create_Args", {"message": "message", "kind": "errc"}),
        "StreamGet": ("XLA_FFI_Stream_Get_Args", {"context": "ctx", "stream": "stream"}),
        "MemoryAllocate": (
            "XLA_FFI_DeviceMemory_Allocate_Args",
            {"bytes": "size", "alignment": "alignment", "data": "data"},
        ),
        "MemoryFree": ("XLA_FFI_DeviceMemory_Free_Args", {"bytes": "size", "data": "data"}),
        "OrdinalGet": ("XLA_FFI_DeviceOrdinal_Get_Args", {"context": "ctx", "ordinal": "device_ordinal"}),
        "Metadata": ("XLA_FFI_Metadata", {"version": "api_version", "traits": "traits"}),
        "MetadataExtension": ("XLA_FFI_Metadata_Extension", {"metadata": "metadata"}),
    }
    lines = ['#include "xla_ffi.h"', '#include "xla/ffi/api/c_api.h"', "using namespace fovea::python;"]
    for ours, (theirs, members) in pairs.items():
        for member, name in members.items():
            lines.append(
                f'static_assert(offsetof(xla::{ours}, {member}) == offsetof({theirs}, {name}), "{ours}::{member}");'
            )
    for value, name in (
        ("kExecute", "ExecutionStage_EXECUTE"),
        ("kBf16", "DataType_BF16"),
        ("kStringAttribute", "AttrType_STRING"),
    ):
        lines.append(f"static_assert(int(xla::{value}) == int(XLA_FFI_{name}));")
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(lines) + "\n")
    include = [f"-I{ROOT / 'python/src'}", f"-I{jax.ffi.include_dir()}"]
    run = subprocess.run(
        [compiler, "-std=c++20", "-fsyntax-only", *include, str(source)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
