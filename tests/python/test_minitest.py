"""python -m fovea.minitest in short: everyone trains, losses agree, and one who computes something else is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fovea.minitest as minitest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(os.environ.get("FOVEA_MINITEST", ROOT / "build/release/tests/fovea_minitest"))
SHORT = ["--device", "cpu", "--steps", "3", "--size", "3,40,16", "--heads", "2"]


def run(tmp_path, *words):
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    status = minitest.main([*SHORT, *files, *words])
    return status, json.loads((tmp_path / "r.json").read_text()), (tmp_path / "r.html").read_text(encoding="utf-8")


def test_everyone_trains_to_the_same_losses(tmp_path, capsys):
    program = ["--cpp", str(PROGRAM)] if PROGRAM.exists() else []
    status, results, page = run(tmp_path, *program)
    printed = capsys.readouterr().out
    assert status == 0 and "all losses agree" in printed
    cells = {(cell["contestant"], cell["options"]): cell for cell in results["cells"]}
    names = {"textbook", "torch.nn", "torch SDPA", "Fovea Python"} | ({"Fovea C++"} if program else set())
    sets = {"none", "mask", "dropout", "mask + dropout", "ragged"}
    assert set(cells) == {(name, options) for name in names for options in sets}
    for cell in cells.values():
        assert len(cell["losses"]) == 3 and cell["losses"][2] < cell["losses"][0] and cell["ms"] > 0
    assert cells["torch.nn", "none"]["kernel"] == "flash_attention_for_cpu"
    assert cells["torch.nn", "dropout"]["kernel"] == cells["textbook", "none"]["kernel"] == "N×N formula"
    assert cells["Fovea Python", "ragged"]["kernel"].endswith(", packed")
    if program:
        assert cells["Fovea C++", "mask"]["kernel"] == cells["Fovea Python", "mask"]["kernel"]
    assert "flash_attn" in results["absent"] and "flash_attn: absent" in printed
    assert page.count('class="bar"') == len(cells) and "http" not in page


@pytest.mark.parametrize("size", ["2,16,32", "3,40,32", "2,100,64", "3,5,32"])
def test_nobody_is_told_in_red_for_another_draw(size, tmp_path, capsys):
    status, results, _ = run(tmp_path, "--size", size, "--steps", "4", "--heads", "4")
    assert status == 0 and all(cell["error"] <= 2 for cell in results["cells"]), capsys.readouterr().out


def test_a_locale_without_utf_8_ends_nothing_and_spoils_no_page(tmp_path):
    ascii_alone = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [*SHORT, "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    run = [sys.executable, "-W", "ignore", "-m", "fovea.minitest", *words]
    printed = subprocess.run(run, env=ascii_alone, capture_output=True, check=True).stdout
    assert b"N?N formula" in printed and "N×N formula" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_what_fovea_refuses_is_no_success(tmp_path, capsys):
    status, results, _ = run(tmp_path, "--size", "2,16,1200")
    printed = capsys.readouterr().out
    assert status == 1 and "Fovea refused 5 of" in printed and "all losses agree" not in printed
    assert all(cell["refused"] for cell in results["cells"] if cell["contestant"] == "Fovea Python")


def test_one_who_computes_something_else_is_told_in_red(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(minitest.OfFovea, "run", lambda self, task: 2.0 * minitest.OfTorch.run(self, task))
    status, results, page = run(tmp_path)
    assert status == 1 and page.count('class="red"') == 5
    assert "Fovea Python, dropout: its losses are" in capsys.readouterr().out
    assert {cell["contestant"] for cell in results["cells"] if cell["error"] > 2} == {"Fovea Python"}


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--size", "3,40"], "--size (3,40) must be three numbers above 0"),
        (["--size", "3,40,x"], "--size (3,40,x) must be three numbers above 0"),
        (["--heads", "7"], "--heads (7) must divide the features of --size (128)"),
        (["--heads", "0"], "argument --heads: '0' must be a whole number above 0"),
        (["--cpp", "/nofile"], "argument --cpp: '/nofile' is no program"),
    ],
)
def test_sizes_are_refused_in_one_line(words, sentence, capsys):
    with pytest.raises(SystemExit):
        minitest.main(words)
    assert sentence in capsys.readouterr().err
