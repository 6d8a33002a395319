"""The GPU ring, for a machine with a GPU: it needs neither compiler nor network.  `./dev gpu` runs it; `./dev gpu --carry
FOLDER` makes a folder with all it takes, and there it is `python3 FOLDER/ring.py [--quick]`.

In order: the GPU's own tests, every problem list, as it is dispatched and by the portable kernels, the rungs of the ladder
and random problems against the oracle, compute-sanitizer on a short list, times beside PyTorch's backends in the same run (without PyTorch:
alone).  Ends with a table, writes OUT/GPU-DATE.json, and exits 1 where a step failed.  What the steps print is kept in
OUT/STEP.log with --logs.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOVEA = HERE / "fovea"
DEVICE = ["--device", "cuda:0"]
SANITIZER_FAULT = 9


def environment(work):
    """NVRTC and cuBLASLt where Python's wheels brought them, kernels compiled here kept out of the user's cache."""
    env = dict(os.environ)
    env.setdefault("FOVEA_CACHE_DIR", str(work / "kernels"))
    packages = Path(sysconfig.get_paths()["purelib"])
    wheels = [*packages.glob("nvidia/cu13/lib/libnvrtc.so.13"), *packages.glob("nvidia/cuda_nvrtc/lib/libnvrtc.so.1?")]
    if wheels and doctor(env)["cuda"]["nvrtc"] is None:
        env.setdefault("FOVEA_NVRTC", str(wheels[0]))
    products = [*packages.glob("nvidia/cu13/lib/libcublasLt.so.1?"), *packages.glob("nvidia/cublas/lib/libcublasLt.so.1?")]
    if products:
        env.setdefault("FOVEA_CUBLASLT", str(products[0]))
    return env


def doctor(env):
    return json.loads(subprocess.run([FOVEA, "doctor", "--json"], env=env, capture_output=True, check=True).stdout)


def made():
    return json.loads((HERE / "made.json").read_text())


def shown(word):
    """A word of a command, without where this machine keeps its files."""
    word = str(word).replace(f"{HERE}/", "")
    return os.path.basename(word) if os.path.isabs(word) else word


def sanitizer():
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def python_with_torch():
    for python in dict.fromkeys([sys.executable, shutil.which("python3")]):
        if python and subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0:
            return python
    return None


class Ring:
    def __init__(self, said, work):
        self.said, self.work, self.env, self.steps = said, work, environment(work), []

    def step(self, name, command, because="", summary=r".*", variables=None):
        """Runs a command, with some environment, and keeps the last line that matches `summary`.  No command: skipped,
        `because`."""
        if self.said.only and name.split(" ")[0] not in self.said.only:
            return
        if command is None:
            self.steps.append({"step": name, "result": "skipped", "seconds": 0, "summary": because})
            return
        print(f"==> {name}", flush=True)
        start = time.monotonic()
        lines = []
        with subprocess.Popen([str(word) for word in command], env={**self.env, **(variables or {})},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout:
                lines.append(line)
                if self.said.verbose or re.match(r"FAIL|     |fovea:|=+ (?!COMPUTE)|\[  FAILED", line):
                    print(line, end="", flush=True)
        told = [line.strip() for line in lines if line.strip() and re.search(summary, line)]
        self.steps.append({"step": name, "result": "passed" if process.returncode == 0 else f"failed ({process.returncode})",
                           "seconds": round(time.monotonic() - start, 1), "summary": told[-1] if told else "",
                           "command": " ".join(map(shown, command))})
        if self.said.logs:
            (self.said.out / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.log").write_text("".join(lines))

    def run(self):
        said, quick = self.said, self.said.quick
        self.step("tests", [HERE / "fovea_gpu_tests"], summary=r"tests? ran|SKIPPED  \] \d|PASSED|FAILED  \] \d")
        layers = HERE / "fovea_nn_tests"
        self.step("layers", [layers] if layers.exists() else None, "carried without layers", summary=r"PASSED|FAILED  \] \d",
                  variables={"FOVEA_LAYERS_DEVICE": "cuda", "FOVEA_TORCH_CASES": str(HERE / "torch_cases.safetensors")})
        for file in sorted((HERE / "problems").glob("*.txt")):
            listed = [FOVEA, "check", f"@{file}", "--seed", said.seed, *DEVICE]
            self.step(f"check {file.stem}", listed, summary="violation")
            self.step(f"portable {file.stem}", [*listed, "--backend", "cuda_portable"], summary="violation")
        self.step("ladder", [FOVEA, "ladder", "--check", "--dtype", "bf16,fp16", "--dim", "64,128", *DEVICE],
                  summary=r"wrong in|right in")
        count = said.random if said.random is not None else (300 if quick else 5000)
        if count:
            kinds = ["--kinds", str(said.kinds)] if said.kinds else []
            self.step("random", [FOVEA, "check", "--random", count, *kinds, "--seed", said.seed, *DEVICE], summary="violation")
        short = HERE / "problems/gpu_short.txt"
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer(), "--tool", tool, "--error-exitcode", SANITIZER_FAULT, FOVEA, "check", f"@{short}", *DEVICE]
            self.step(f"sanitizer {tool}", command if sanitizer() else None, "there is no compute-sanitizer",
                      summary="SUMMARY", variables={"FOVEA_RACECHECK": "1"} if tool == "racecheck" else {})
        return self.times()

    def times(self):
        python, numbers = python_with_torch(), self.work / "times.json"
        if python:
            command = [python, HERE / "bench/peers.py", "--lib", HERE / "libfovea.so", "--json", numbers]
            command += ["--quick"] if self.said.quick else []
        else:
            command = [FOVEA, "bench", f"@{HERE}/bench/grid.txt", f"@{HERE}/bench/beyond.txt", *DEVICE, "--json", numbers,
                       "--seconds", "0.05"]
        self.said.verbose = True
        self.step("times", command, summary="geometric mean|copies")
        return json.loads(numbers.read_text()) if numbers.exists() else None

    def tell(self):
        print()
        for step in self.steps:
            print(f"{step['step']:24} {step['result']:12} {step['seconds']:7.1f} s  {step['summary'][:120]}")
        return all(not step["result"].startswith("failed") for step in self.steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="300 random problems, a third of the grid")
    parser.add_argument("--random", type=int, help="random problems; 5000 where left out, 0: none")
    parser.add_argument("--kinds", type=int, default=made()["random_kinds"],
                        help="kinds of random problems: those whose kernels were carried where left out, 0: any")
    parser.add_argument("--seed", type=int, default=1, help="of all numbers, and of the random problems")
    parser.add_argument("--only", nargs="+", choices=["tests", "check", "portable", "ladder", "random", "sanitizer", "times"], help="these steps")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for GPU-DATE.json; here where left out")
    parser.add_argument("--logs", action="store_true", help="keep what the steps print, beside it")
    parser.add_argument("--verbose", action="store_true", help="show all of it")
    said = parser.parse_args()
    said.out.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        ring = Ring(said, Path(folder))
        machine = doctor(ring.env)
        if not machine["cuda"]["gpus"]:
            sys.exit(f"ring.py: {machine['cuda']['driver_problem']}; run it where there is a GPU")
        gpu = machine["cuda"]["gpus"][0]["name"]
        print(f"{gpu}, driver {machine['cuda']['driver']}, NVRTC {machine['cuda']['nvrtc'] or machine['cuda']['nvrtc_problem']}")
        times = ring.run()
    right = ring.tell()
    now = datetime.datetime.now(datetime.timezone.utc)
    page = {"gpu": gpu, "date": now.isoformat(timespec="seconds"), "made": made(),
            "driver": machine["cuda"]["driver"], "nvrtc": machine["cuda"]["nvrtc"], "quick": said.quick, "steps": ring.steps,
            "times": times}
    file = said.out / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}-{now:%Y-%m-%d}{'-quick' if said.quick else ''}.json"
    file.write_text(json.dumps(page, indent=1) + "\n")
    print(f"\nnumbers: {file}")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
