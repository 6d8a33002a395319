"""Fovea against PyTorch's attention on this CPU, in one run: interleaved, medians, and shares of what the units can do.

    python3 bench/peers_cpu.py [--threads N] [--json FILE] [--html FILE] [LINE | @FILE ...]

Without lines: bench/cpu.txt.  Fovea is called through its C interface (include/fovea/c.h) on PyTorch's memory.  Each run begins
after a pause, when nobody's threads spin any more.  Backward times are of the gradients alone, with out and lse there.
FLOPs count as the papers do.  Before every line `fovea bench` measures the multiply-add rate of the units that the line's
dtype is multiplied by (of AVX or AMX, as chosen), and the script how fast memory is read.
"""

import argparse
import datetime
import html
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

import peers

HERE = Path(__file__).resolve().parent
peers.DEVICE = "cpu"
peers.PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
READ_FLOATS = 1 << 26  # 256 MiB, more than most caches
PAUSE = 0.03  # seconds before each run: threads of OpenMP go on spinning for milliseconds and would take the next one's cores


class Clock:
    def __init__(self, seconds, most):
        self.seconds, self.most = seconds, most

    @staticmethod
    def once(work):
        time.sleep(PAUSE)
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)

    def compare(self, contenders):
        """Median milliseconds of each, taken in turns."""
        longest = sum(1e3 * PAUSE + self.once(work) for work in contenders.values())
        repeats = max(5, min(self.most, int(self.seconds * 1e3 / max(longest, 1e-3))))
        times = {name: [] for name in contenders}
        for _ in range(repeats):
            for name, work in contenders.items():
                times[name].append(self.once(work))
        return {name: statistics.median(values) for name, values in times.items()}


class Ceilings:
    """The best rates seen so far, of each dtype's units in GFLOP/s and of reading in GB/s."""

    def __init__(self, program, threads):
        self.program, self.threads = program, threads
        self.rates, self.units, self.read = {}, {}, 0.0
        self.memory = torch.ones(READ_FLOATS)

    def measure(self, dtype):
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "page.json"
            subprocess.run([self.program, "bench", f"fwd {dtype} b1 hq1 sq64 d64", "--threads", str(self.threads), "--json", page],
                           check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            result = json.loads(page.read_text())["results"][0]
        self.rates[dtype] = max(self.rates.get(dtype, 0.0), result["fma_gflops"])
        self.units[dtype] = result["fma_isa"]
        self.read = max([self.read] + [READ_FLOATS * 4e-6 / Clock.once(self.memory.sum) for _ in range(3)])


def measure(library, clock, ceilings, p, direction):
    dtype = p.line.split()[1]
    ceilings.measure(dtype)
    row, _ = peers.measure(library, clock, p, direction)
    ceilings.measure(dtype)
    row["dtype"] = dtype
    row["gflops"] = {name: 1e3 * figure for name, figure in row.pop("tflops").items()}
    return row


def share(row, name, page):
    """Of the unit's rate, or for decoding of the read rate."""
    if name not in row["milliseconds"]:
        return math.nan
    if "gbytes_per_second" in row:
        return row["gbytes_per_second"][name] / page["read_gbytes_per_second"]
    return row["gflops"][name] / page["unit_gflops"][row["dtype"]]


def tell(row):
    cells = [f"{row['milliseconds'].get(name, math.nan):9.2f}" for name in ("fovea", *peers.PEERS)]
    ratios = [f"{row.get('speedup', {}).get(name, math.nan):6.2f}" for name in peers.PEERS]
    figure = row.get("gbytes_per_second", row["gflops"]).get("fovea", math.nan)
    print(f"{row['name']:18.18} {row['dtype']:4} {row['pass']:8} {' '.join(cells)}  {figure:8.0f}  {' '.join(ratios)}"
          + (f"  DIFFERS by {row['difference']:.3f}" if not row.get("difference", 0) <= 0.02 else "")
          + (f"  fovea: {row['refusals']['fovea']}" if "fovea" in row["refusals"] else ""), flush=True)


def picture(page):
    """Bars of the shares, a row each."""
    colours = {"fovea": "#0b6e4f", "flash": "#d98e04", "math": "#9aa0a6"}
    rows = []
    for row in page["rows"]:
        bars = "".join(
            f'<div class="bar" style="width:{min(100.0, 100 * share(row, name, page)):.2f}%;background:{colours[name]}"></div>'
            f'<span>{name} {100 * share(row, name, page):.1f}% · {row["milliseconds"][name]:.2f} ms</span><br>'
            for name in colours if name in row["milliseconds"])
        faster = ", ".join(f"{ratio:.2f}× {name}" for name, ratio in row.get("speedup", {}).items())
        rows.append(f'<tr><td><b>{html.escape(row["name"])}</b><br><code>{html.escape(row["line"])}</code></td>'
                    f"<td>{bars}</td><td>{faster}</td></tr>")
    units = ", ".join(f"{dtype} {rate:.0f} GFLOP/s ({page['units'][dtype]})" for dtype, rate in page["unit_gflops"].items())
    return f"""<!doctype html><meta charset="utf-8"><title>Fovea and PyTorch on this CPU</title>
<style>body{{font:14px system-ui;margin:2em auto;max-width:72em}}td{{padding:.5em 1em;border-top:1px solid #ddd;vertical-align:top}}
td:nth-child(2){{width:50%}}.bar{{height:.6em;display:inline-block;min-width:1px}}code{{color:#666;font-size:12px}}span{{color:#444}}</style>
<h1>Fovea and PyTorch on this CPU</h1>
<p>{html.escape(page["cpu"])}, {page["threads"]} threads, PyTorch {page["torch"]}, Fovea {page["fovea"]}, {page["date"]}.
Bars are shares of what the units did in this run: {units}; for decoding, of the read rate, {page["read_gbytes_per_second"]:.0f} GB/s.</p>
<table>{"".join(rows)}</table>
"""


def cpu_name():
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0] if names else "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lines", nargs="*", help="problem lines or @FILE; bench/cpu.txt where left out")
    parser.add_argument("--lib", default=HERE.parent / "build/shared/src/libfovea.so", help="libfovea.so")
    parser.add_argument("--program", default=HERE.parent / "build/release/fovea", help="the fovea command")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="all that the process may use")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line and pass, beyond the warm-up")
    parser.add_argument("--most", type=int, default=50, help="runs of a line")
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--html", help="and a picture to this")
    said = parser.parse_args()
    for option, make in ("program", "./dev build"), ("lib", "cmake --preset release -B build/shared -DBUILD_SHARED_LIBS=ON"):
        if not Path(getattr(said, option)).is_file():
            parser.error(f"--{option} ({getattr(said, option)}) is not there; begin with `{make}`")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: said.threads])
    torch.set_num_threads(said.threads)

    library = peers.Library(said.lib)
    clock, ceilings = Clock(said.seconds, said.most), Ceilings(said.program, said.threads)
    page = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "fovea": library.version,
            "cpu": cpu_name(), "threads": said.threads, "torch": torch.__version__, "rows": []}
    print(f"{page['cpu']}, {said.threads} threads, PyTorch {page['torch']}, Fovea {library.version}\n"
          f"{'':18} {'':4} {'':8} {'fovea ms':>9} {'flash ms':>9} {'math ms':>9}  {'GFLOP/s':>8}  {'×flash':>6} {'×math':>6}")
    problems = [p for text in said.lines for p in (peers.lines_of(text[1:]) if text.startswith("@") else [peers.Problem(text, text)])]
    for p in problems or peers.lines_of(HERE / "cpu.txt"):
        for direction in p.passes():
            page["rows"].append(measure(library, clock, ceilings, p, direction))
            tell(page["rows"][-1])

    page |= {"unit_gflops": ceilings.rates, "units": ceilings.units, "read_gbytes_per_second": ceilings.read}
    plain = {row["pass"]: row["milliseconds"].get("fovea") for row in page["rows"] if row["name"] == "plain 2048"}
    print("\nshares of the unit's rate (decode: of the read rate), and times over plain 2048")
    for row in page["rows"]:
        row["shares"] = {name: share(row, name, page) for name in row["milliseconds"]}
        shares = "  ".join(f"{name} {100 * value:5.1f}%" for name, value in row["shares"].items())
        option = row["line"].split()[1:5] == ["fp32", "b1", "hq16", "sq2048"] and " d64" in row["line"] and plain
        if option and "fovea" in row["milliseconds"]:
            row["over_plain"] = row["milliseconds"]["fovea"] / plain[row["pass"]]
            shares += f"  {row['over_plain']:.2f}× plain"
        print(f"{row['name']:18.18} {row['dtype']:4} {row['pass']:8} {shares}")
    for dtype in ceilings.rates:
        rows = [row for row in page["rows"] if row["dtype"] == dtype and row["name"].endswith(("full", "causal"))]
        for what, figures in peers.summary_of(rows).items():
            page.setdefault("summary", {})[f"{dtype} {what}"] = figures
            print(f"{dtype} {what}: {figures['geometric_mean']:.2f} in the geometric mean of {figures['cells']}, "
                  f"least {figures['least']:.2f}")
    if said.json:
        Path(said.json).write_text(json.dumps(page, indent=1) + "\n")
    if said.html:
        Path(said.html).write_text(picture(page))
    return 1 if any("fovea" in row["refusals"] for row in page["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
