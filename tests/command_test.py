"""The fovea command from outside: every command, every exit code, files good and hostile.  Usage: command_test.py FOVEA"""

import json
import math
import os
import pty
import random
import re
import resource
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

FOVEA = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "fovea"
SAMPLE = Path(__file__).resolve().parent.parent / "examples" / "data" / "minilm.safetensors"
LINE = "fwd fp32 b1 hq2 sq16 d8"
TOO_LARGE = "fwd fp32 b1024 hq1024 sq1048576 d128"  # valid, and more than any memory
GPUS = len(json.loads(subprocess.run([FOVEA, "doctor", "--json"], capture_output=True, check=True).stdout)["cuda"]["gpus"])
FAKE_DRIVER = Path(FOVEA).resolve().parent / "tests" / "fake_driver"  # a libcuda that claims GPUs
FORMATS = {"F32": "f", "F16": "e", "I32": "i", "I64": "q", "U8": "B", "BOOL": "?"}


# ---- files ------------------------------------------------------------------------------------------------------------


def flat(values):
    return [x for value in values for x in flat(value)] if isinstance(values, list) else [values]


def shape_of(values):
    return [len(values), *shape_of(values[0])] if isinstance(values, list) else []


def pack(dtype, values):
    return struct.pack(f"<{len(flat(values))}{FORMATS[dtype]}", *flat(values))


def write_safetensors(path, tensors, metadata=None):
    """tensors: name → (dtype, nested lists)."""
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, values) in tensors.items():
        packed = pack(dtype, values)
        header[name] = {"dtype": dtype, "shape": shape_of(values), "data_offsets": [len(data), len(data) + len(packed)]}
        data += packed
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path):
    """name → (dtype, shape, flat values)."""
    whole = Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", whole)
    header = json.loads(whole[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        code = FORMATS[entry["dtype"]]
        count = (end - begin) // struct.calcsize("<" + code)
        tensors[name] = (entry["dtype"], entry["shape"], list(struct.unpack(f"<{count}{code}", whole[begin:end])))
    return tensors


def write_npy(path, descr, values, order="False"):
    dictionary = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {tuple(shape_of(values))}, }}\n".encode()
    dtype = {"<f4": "F32", "|b1": "BOOL", "<i4": "I32", "<i8": "I64"}[descr]
    Path(path).write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(dictionary)) + dictionary + pack(dtype, values))


# ---- what attention is, in a few lines of Python ----------------------------------------------------------------------


def attention(q, k, v, visible=lambda b, h, i, j: True, bias=lambda b, h, i, j: 0.0):
    """out [b][i][h][e] and lse [b][h][i] of nested lists [b][row][head][dim]."""
    batch, rows, heads, dim = shape_of(q)
    group = heads // len(k[0][0])
    out = [[[[0.0] * len(v[0][0][0]) for _ in range(heads)] for _ in range(rows)] for _ in range(batch)]
    lse = [[[-math.inf] * rows for _ in range(heads)] for _ in range(batch)]
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                keys = [j for j in range(len(k[b])) if visible(b, h, i, j)]
                if not keys:
                    continue
                s = [sum(x * y for x, y in zip(q[b][i][h], k[b][j][h // group])) / math.sqrt(dim) + bias(b, h, i, j) for j in keys]
                total = sum(math.exp(x) for x in s)
                lse[b][h][i] = math.log(total)
                for x, j in zip(s, keys):
                    for e, value in enumerate(v[b][j][h // group]):
                        out[b][i][h][e] += math.exp(x) / total * value
    return out, lse


def numbers(generator, *shape):
    if len(shape) == 1:
        return [struct.unpack("<f", struct.pack("<f", generator.gauss(0, 1)))[0] for _ in range(shape[0])]
    return [numbers(generator, *shape[1:]) for _ in range(shape[0])]


# ---- driving the command ----------------------------------------------------------------------------------------------


class CommandTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="fovea_")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def path(self, name):
        return str(self.folder / name)

    def fovea(self, *words, code=0, env=None):
        """Runs the command in a pipe, where nothing may have colours, and returns its standard output."""
        done = subprocess.run(
            [FOVEA, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TERM": "xterm-256color", **(env or {})},
        )
        self.stderr = done.stderr
        self.assertEqual(done.returncode, code, f"{words}: {done.stdout}{done.stderr}")
        self.assertNotIn("\x1b", done.stdout + done.stderr, words)
        self.assertNotIn("\r", done.stdout + done.stderr, words)
        if code == 0:
            self.assertEqual(done.stderr, "", words)
        return done.stdout

    def refuse(self, *words, says="", code=2, env=None):
        """The command must refuse with one line on stderr, nothing on stdout, and leave no file behind."""
        before = sorted(os.listdir(self.folder))
        self.assertEqual(self.fovea(*words, code=code, env=env), "", words)
        self.assertEqual(self.stderr.count("\n"), 1, self.stderr)
        self.assertTrue(self.stderr.startswith("fovea: "), self.stderr)
        self.assertIn(says, self.stderr)
        self.assertEqual(sorted(os.listdir(self.folder)), before)

    def tensors(self, seed=1, batch=2, sq=3, skv=5, hq=4, hkv=2, d=8, dv=6):
        generator = random.Random(seed)
        return {
            "q": ("F32", numbers(generator, batch, sq, hq, d)),
            "k": ("F32", numbers(generator, batch, skv, hkv, d)),
            "v": ("F32", numbers(generator, batch, skv, hkv, dv)),
        }

    def file(self, tensors, name="in.safetensors", metadata=None):
        write_safetensors(self.path(name), tensors, metadata)
        return self.path(name)

    def assert_close(self, found, expected, tolerance=1e-5):
        expected = flat(expected)
        self.assertEqual(len(found), len(expected))
        for x, y in zip(found, expected):
            self.assertTrue(x == y or abs(x - y) <= tolerance * max(1.0, abs(y)), f"{x} is not {y}")


class Help(CommandTest):
    def test_help_names_commands_variables_and_exit_codes(self):
        text = self.fovea("--help")
        for word in ("run", "explain", "check", "bench", "tune", "ladder", "precompile", "doctor", "FOVEA_CPU_ISA", "FOVEA_JIT", "NO_COLOR", "Exit codes"):
            self.assertIn(word, text)
        contract = (Path(__file__).resolve().parent.parent / "docs" / "contract.md").read_text(encoding="utf-8")
        variables = re.findall(r"^\| `([A-Z_]+)` \|", contract, re.MULTILINE)
        self.assertGreater(len(variables), 7)
        for variable in variables:
            self.assertIn(f"\n  {variable} ", text)
        for command in ("run", "explain", "check", "bench", "tune", "ladder", "precompile", "doctor"):
            self.assertIn("--help", self.fovea(command, "--help"))
        self.assertRegex(self.fovea("--version"), r"^fovea \d+\.\d+\.\d+\n$")

    def test_words_not_understood_are_refused(self):
        self.refuse(says="no command")
        self.refuse("fly", says="'fly' is no command")
        self.refuse("--colour", says="'--colour' is no command")
        self.refuse("run", LINE, "--colour", says="--colour")
        self.refuse("doctor", "extra")
        self.refuse("run", SAMPLE, "--heads", "1,x", says="--heads")
        self.refuse("explain", LINE, "--threads", "many", says="--threads")
        self.refuse("explain", LINE, "--threads", "-1", says="--threads")
        self.refuse("bench", LINE, "--repeat", "0", says="--repeat")
        self.refuse("bench", LINE, "--seconds", "nan", says="--seconds")
        for command in (("bench", LINE), ("ladder",)):
            self.refuse(*command, "--repeat", "2", "--seconds", "1", says="--repeat excludes --seconds")
        self.refuse("check", "--random", "-5", says="--random")
        for command in (("run", SAMPLE), ("check", LINE), ("bench", LINE)):
            for seed in ("-1", "18446744073709551616", "99999999999999999999", "1.5", "0x1", ""):
                self.refuse(*command, "--seed", seed, says=f"--seed: '{seed}' is no whole number from 0 to 18446744073709551615")
        self.fovea("check", LINE, "--seed", "18446744073709551615")
        self.assertEqual(json.loads(self.fovea("bench", LINE, "--repeat", "010", "--json", "-"))["results"][0]["runs"], 10)
        self.assertEqual(self.fovea("check", "--random", "3", "--seed", "010", "--list"), self.fovea("check", "--random", "3", "--seed", "10", "--list"))
        for option, words in (("--repeat", ("bench", LINE)), ("--threads", ("check", LINE)), ("--seqlen", ("ladder",))):
            for given in ("0x10", "1e1", " 5", "five", "99999999999999999999"):
                self.refuse(*words, option, given, says=f"{option}: '{given}' is no whole number from ")
        self.refuse("check", LINE, "--kinds", "2", says="--kinds requires --random")
        self.refuse("tune", LINE, "--device", "cpu", says="--device cpu has no tiles to choose; name a GPU, as in cuda:0")
        for seconds in ("0", "nan", "-nan", "inf"):
            self.refuse("tune", LINE, f"--seconds={seconds}", says=f"--seconds ({seconds}) must lie between 0.001 and 3600")
        self.refuse("precompile", LINE, says="--arch")
        self.refuse("precompile", LINE, "--arch", "sm_80", says="--out")
        self.refuse("precompile", "--arch", "sm_80,sm_90", LINE, says="--out")  # a list ends where its word does
        self.refuse("precompile", LINE, "--arch", "sm_88", "--check", says="use one of sm_75, sm_80, sm_86, sm_87, sm_89, sm_90, sm_100, sm_110, sm_120")
        for arch in ("sm_8", "sm_80a", "sm_a", "sm_90aa", "90a"):
            self.refuse("precompile", LINE, "--arch", f"sm_80,{arch}", "--check", says=f"--arch '{arch}' is no architecture")
        self.refuse("precompile", "fwd fp64", "--arch", "sm_80", "--check", says="fp64")
        known = self.folder / "known.txt"
        self.refuse("precompile", LINE, "--arch", "sm_80", "--check", "--known-spills", known, says=f"--known-spills: {known}: No such file")
        self.refuse("precompile", LINE, "--arch", "sm_80", "--check", "--known-spills", self.folder, says="is not a regular file")
        for option in ("--median-seconds", "--most-seconds"):
            for seconds in ("-5", "nan"):
                self.refuse("precompile", LINE, "--arch", "sm_80", "--check", f"{option}={seconds}", says=f"{option} ({seconds}) must be at least 0")
        for option in ("--known-spills", "--median-seconds", "--most-seconds"):
            self.refuse("precompile", LINE, "--arch", "sm_80", "--out", self.path("pack"), option, "1", says=f"{option} requires --check")
        known.write_text("# a comment\nforward_bf16_d64 sm_80\n")
        self.refuse("precompile", LINE, "--arch", "sm_80", "--check", "--known-spills", known, says="write KERNEL sm_NN BYTES")

    @unittest.skipUnless(FAKE_DRIVER.exists(), "the driver of tests/faults is not built")
    def test_tiles_are_forgotten_all_together_or_not_at_all(self):
        gpu = {"LD_LIBRARY_PATH": str(FAKE_DRIVER), "FOVEA_CACHE_DIR": self.path("cache")}
        self.refuse("tune", "--forget", LINE, says=f"--forget drops the tiles of all problems, not those of '{LINE}' alone", env=gpu)
        self.refuse("tune", "--forget", says="there is no folder to keep tiles in", env={**gpu, "FOVEA_JIT": "off"})
        self.refuse("tune", "--forget", says="fovea cannot be written; set FOVEA_CACHE_DIR", env={**gpu, "FOVEA_CACHE_DIR": str(Path(FOVEA).resolve())})
        self.assertIn("0 kinds of problems have a tile of their own", self.fovea("tune", "--forget", env=gpu))

    def test_a_full_disk_under_standard_output_is_a_failure(self):
        with open("/dev/full", "w") as full:
            done = subprocess.run([FOVEA, "explain", LINE], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        self.assertEqual(done.returncode, 3)
        self.assertIn("standard output", done.stderr)


class Run(CommandTest):
    def test_results_are_those_of_the_formula(self):
        tensors = self.tensors()
        q, k, v = (tensors[name][1] for name in "qkv")
        generator = random.Random(7)
        mask = [[[[generator.random() < 0.6 for _ in range(5)] for _ in range(3)]] for _ in range(2)]
        bias = numbers(generator, 1, 4, 1, 5)
        cases = [
            ("", {}, lambda b, h, i, j: True),
            ("causal=top_left", {}, lambda b, h, i, j: j <= i),
            ("causal=bottom_right window=1,-", {}, lambda b, h, i, j: i + 1 <= j <= i + 2),
            ("kvlen=4,0", {}, lambda b, h, i, j: j < (4, 0)[b]),
            ("", {"mask": ("BOOL", mask)}, lambda b, h, i, j: mask[b][0][i][j]),
            ("", {"mask": ("U8", [[[[3 * x for x in row] for row in mask[0][0]]], [[[x for x in row] for row in mask[1][0]]]])}, lambda b, h, i, j: mask[b][0][i][j]),
            ("", {"kv_lengths": ("I32", [5, 2]), "q_lengths": ("I64", [1, 3])}, lambda b, h, i, j: i < (1, 3)[b] and j < (5, 2)[b]),
        ]
        for options, more, visible in cases:
            for biased in (False, True):
                extra = {"bias": ("F32", bias)} if biased else {}
                with self.subTest(options=options, more=list(more), biased=biased):
                    source = self.file({**tensors, **more, **extra})
                    self.fovea("run", source, "--options", options, "--out", self.path("out"))
                    found = read_safetensors(self.path("out"))
                    out, lse = attention(q, k, v, visible, (lambda b, h, i, j: bias[0][h][0][j]) if biased else lambda *_: 0.0)
                    self.assertEqual(list(found), ["out", "lse"])
                    self.assertEqual(found["out"][:2], ("F32", [2, 3, 4, 6]))
                    self.assertEqual(found["lse"][:2], ("F32", [2, 4, 3]))
                    self.assert_close(found["out"][2], out)
                    self.assert_close(found["lse"][2], lse)

    def test_heads_first_tensors_give_heads_first_results(self):
        tensors = self.tensors()
        turned = {name: (dtype, [[[row[h] for row in rows] for h in range(len(rows[0]))] for rows in values]) for name, (dtype, values) in tensors.items()}
        dout = numbers(random.Random(3), 2, 3, 4, 6)
        turned["dout"] = ("F32", [[[row[h] for row in rows] for h in range(4)] for rows in dout])
        self.fovea("run", self.file({**tensors, "dout": ("F32", dout)}), "--grad", "--out", self.path("a"))
        page = json.loads(self.fovea("run", self.file(turned), "--grad", "--options", "layout=bhsd", "--json", "--out", self.path("b")))
        for name, (_, values) in turned.items():
            self.assertEqual(page["inputs"][name]["shape"], shape_of(values))
        a, b = read_safetensors(self.path("a")), read_safetensors(self.path("b"))
        self.assertEqual(b["out"][1], [2, 4, 3, 6])
        self.assertEqual(b["dk"][1], [2, 2, 5, 8])
        self.assertEqual(a["lse"], b["lse"])
        for name in ("out", "dq", "dk", "dv"):
            batch, heads, rows, dim = b[name][1]
            at = lambda n, h, i, e: b[name][2][((n * heads + h) * rows + i) * dim + e]
            self.assertEqual(a[name][2], [at(n, h, i, e) for n in range(batch) for i in range(rows) for h in range(heads) for e in range(dim)])

    def test_gradients_are_those_of_finite_differences(self):
        tensors = self.tensors(batch=1, sq=2, skv=3, hq=2, hkv=1, d=2, dv=2)
        generator = random.Random(5)
        bias, dout = numbers(generator, 1, 1, 2, 3), numbers(generator, 1, 2, 2, 2)
        source = self.file({**tensors, "bias": ("F32", bias), "dout": ("F32", dout)})
        self.fovea("run", source, "--grad", "--out", self.path("out"))
        found = read_safetensors(self.path("out"))
        self.assertEqual(list(found), ["out", "lse", "dq", "dk", "dv", "dbias"])
        self.assertEqual(found["dbias"][1], [1, 1, 2, 3])
        values = {**{name: tensors[name][1] for name in "qkv"}, "bias": bias}

        def loss():
            out, _ = attention(values["q"], values["k"], values["v"], bias=lambda b, h, i, j: values["bias"][0][0][i][j])
            return sum(x * y for x, y in zip(flat(out), flat(dout)))

        def rows_of(nested):
            return [nested] if not isinstance(nested[0], list) else [row for part in nested for row in rows_of(part)]

        for name in values:
            slopes = []
            for row in rows_of(values[name]):
                for n, kept in enumerate(row):
                    row[n] = kept + 1e-5
                    above = loss()
                    row[n] = kept - 1e-5
                    slopes.append((above - loss()) / 2e-5)
                    row[n] = kept
            self.assert_close(found["d" + name][2], slopes, 1e-4)

    def test_every_optional_input_has_its_gradient(self):
        generator = random.Random(5)
        more = {
            "alibi_slopes": ("F32", numbers(generator, 2, 4)),
            "sink": ("F32", numbers(generator, 4)),
            "bias": ("F32", numbers(generator, 1, 4, 1, 5)),
            "dout": ("F32", numbers(generator, 2, 3, 4, 6)),
            "dlse": ("F32", numbers(generator, 2, 4, 3)),
        }
        page = json.loads(self.fovea("run", self.file({**self.tensors(), **more}), "--grad", "--check", "--json", "--out", self.path("out")))
        found = read_safetensors(self.path("out"))
        self.assertEqual(list(found), ["out", "lse", "dq", "dk", "dv", "dbias", "dalibi_slopes", "dsink"])
        for name in ("bias", "alibi_slopes", "sink"):
            self.assertEqual(found["d" + name][1], shape_of(more[name][1]))
        self.assertTrue(page["check"]["right"])
        self.assertEqual(set(page["check"]["ratios"]), set(found))
        self.assertEqual([p["pass"] for p in page["passes"]], ["forward", "backward"])

    def test_packed_sequences_give_what_each_gives_alone(self):
        generator = random.Random(9)
        lengths = [3, 0, 4]
        rows = {name: numbers(generator, 7, 2, 4) for name in "qkv"}
        ends = [0, 3, 3, 7]
        packed = {name: ("F32", values) for name, values in rows.items()}
        for name in ("cu_seqlens_q", "cu_seqlens_kv"):
            packed[name] = ("I32", ends)
        self.refuse("run", self.file(packed), "--options", "layout=bhsd", says="layout=bhsd belongs to padded tensors")
        self.fovea("run", self.file(packed), "--options", "causal=bottom_right", "--out", self.path("out"))
        found = read_safetensors(self.path("out"))
        self.assertEqual(found["lse"][1], [2, 7])
        for n, length in enumerate(lengths):
            if length == 0:
                continue
            alone = {name: ("F32", [values[ends[n] : ends[n + 1]]]) for name, values in rows.items()}
            self.fovea("run", self.file(alone, "one.safetensors"), "--options", "causal=bottom_right", "--out", self.path("one"))
            one = read_safetensors(self.path("one"))
            self.assert_close(found["out"][2][ends[n] * 8 : ends[n + 1] * 8], one["out"][2])

    def test_npy_files_say_what_a_safetensors_file_says(self):
        tensors = self.tensors()
        mask = [[[[(i + j) % 3 != 0 for j in range(5)] for i in range(3)]]]
        words = []
        for name, (_, values) in tensors.items():
            write_npy(self.path(name + ".npy"), "<f4", values)
            words += ["--" + name, self.path(name + ".npy")]
        write_npy(self.path("mask.npy"), "|b1", mask)
        write_npy(self.path("lengths.npy"), "<i8", [4, 5])
        self.fovea("run", *words, "--mask", self.path("mask.npy"), "--kv-lengths", self.path("lengths.npy"), "--out", self.path("a"))
        self.fovea("run", self.file({**tensors, "mask": ("BOOL", mask), "kv_lengths": ("I32", [4, 5])}), "--out", self.path("b"))
        self.assertEqual(Path(self.path("a")).read_bytes(), Path(self.path("b")).read_bytes())
        self.refuse("run", "--q", self.path("q.npy"), says="no tensor 'k'")
        write_npy(self.path("q.npy"), "<f4", tensors["q"][1], order="True")
        self.refuse("run", *words, says="Fortran")
        Path(self.path("q.npy")).write_bytes(b"\x93NUMPY\x01\x00\xff\xff{")
        self.refuse("run", *words, says="q.npy")

    def test_summary_says_who_ran_it_and_what_was_not_read(self):
        source = self.file({**self.tensors(), "alibi_slopes": ("F32", [0.5] * 4), "attn_mask": ("BOOL", [[True]])})
        text = self.fovea("run", source)
        for word in ("q", "fp32 [2, 3, 4, 8]", "alibi_slopes fp32 [4]", "cpu", "GFLOP/s", "workspace", "not read", "'attn_mask'", "lse"):
            self.assertIn(word, text)
        page = json.loads(self.fovea("run", source, "--json"))
        self.assertEqual(page["not_read"], ["attn_mask"])
        self.assertEqual(page["problem"], "fwd fp32 b2 hq4 hkv2 sq3 skv5 d8 dv6 alibi")
        report = page["passes"][0]["report"]
        self.assertTrue(report["backend"].startswith("cpu"))
        self.assertGreater(page["passes"][0]["median_seconds"], 0)
        self.assertEqual(page["results"]["out"], {"dtype": "fp32", "shape": [2, 3, 4, 6]})

    def test_the_sample_runs_and_is_right(self):
        page = json.loads(self.fovea("run", SAMPLE, "--check", "--json", "--plot", self.path("picture.html")))
        self.assertTrue(page["check"]["right"])
        picture = Path(self.path("picture.html")).read_text(encoding="utf-8")
        self.assertIn("rabbit", picture)
        self.assertIn("right", self.fovea("run", SAMPLE, "--check"))
        self.fovea("run", "--plot", self.path("p.html"), "--heads", "0,3", SAMPLE)
        for words, says in ((("--heads", "0,12"), "12"), (("--sequence", "1"), "sequence (1)")):
            self.refuse("run", SAMPLE, "--plot", self.path("p.html"), *words, "--out", self.path("out"), says=says)

    def test_infinite_keys_are_judged_like_others(self):
        tensors = self.tensors(batch=1, sq=2, skv=3, hq=2, hkv=1, d=2, dv=2)
        tensors["q"][1][0][0][0][0], tensors["q"][1][0][0][1][0] = -1.0, 1.0
        tensors["k"][1][0][1][0][0] = math.inf  # a score of -inf weighs nothing, one of +inf makes its row NaN
        source = self.file(tensors)
        for options in ("", "softcap=3", "causal=top_left"):
            self.fovea("run", source, "--check", "--options", options)

    def test_random_tensors_depend_on_the_seed_alone(self):
        line = "fwd+bwd bf16 b1 hq2 hkv1 sq9 skv7 d8 mask=b11k bias=1hqk:fp32 alibi sink dropout=0.2 seed=5"
        for name, seed in (("a", 3), ("b", 3), ("c", 4)):
            self.fovea("run", "--problem", line, "--seed", seed, "--out", self.path(name))
        a, b, c = (Path(self.path(name)).read_bytes() for name in "abc")
        self.assertEqual(a, b)
        self.assertNotEqual(a, c)
        for name in (b'"dq"', b'"dsink"', b'"dbias"', b'"BF16"'):
            self.assertIn(name, a)

    def test_threads_and_backends_give_the_same_answer(self):
        source = self.file(self.tensors())
        self.fovea("run", source, "--out", self.path("a"), "--threads", "1")
        self.fovea("run", source, "--out", self.path("b"), "--threads", "3")
        self.assertEqual(Path(self.path("a")).read_bytes(), Path(self.path("b")).read_bytes())
        page = json.loads(self.fovea("run", source, "--backend", "reference", "--json", "--out", self.path("c")))
        self.assertEqual(page["passes"][0]["report"]["backend"], "reference")
        self.assert_close(read_safetensors(self.path("a"))["out"][2], read_safetensors(self.path("c"))["out"][2])

    def test_what_the_user_got_wrong_is_one_sentence(self):
        tensors = self.tensors()
        good = self.file(tensors, "good.safetensors")
        self.refuse("run", says="no tensors")
        self.refuse("run", good, "--problem", LINE, says="one place")
        self.refuse("run", good, "--q", good, says="one place")
        self.refuse("run", "--q", "", says="--q: the path is empty")
        self.refuse("check", "--backend", "", LINE, says="--backend: the name is empty")
        self.refuse("check", "@", says="path of a file to read is empty")
        self.refuse("run", "--problem", "", says="--problem: the line is empty")
        self.refuse("run", good, "--heads", "0", says="--heads requires --plot")
        self.refuse("run", good, "--sequence", "0", says="--sequence requires --plot")
        self.refuse("run", good, "--options", "dropout=0.1", "--seed", "7", says="--seed requires --problem")
        self.refuse("run", "--problem", LINE, "--options", "causal=top_left", says="--options")
        self.refuse("run", "--problem", "fwd fp32 b1 sq8 d8", says="hq")
        self.refuse("run", self.path("absent.safetensors"), says="absent.safetensors")
        self.refuse("run", self.folder, says="not a regular file")
        self.refuse("run", good, "--grad", says="dout")
        self.refuse("run", good, "--backend", "fastest", says="fastest")
        for options in ("causal", "causal=middle", "colour=red", "mask=b11k", "bias=1111", "alibi", "sink", "b4", "packed=3+4"):
            self.refuse("run", good, "--options", options, says="--options")
        self.refuse("run", good, "--options", "causal=top_left mask=b11k", says="--options: token 'mask=b11k' says what the tensors say")
        self.refuse("run", "some/q.npy", says="'some/q.npy' is a NumPy file; say whose it is, as in --q some/q.npy")
        self.refuse("tune", LINE, "--device", "sm_90", says="only `fovea explain` takes; name what is here, as in cuda:0")
        self.refuse("run", good, "--options", "kvlen=9,9", says="good.safetensors")
        self.refuse("run", good, "--options", "kvlen=1,2,3", says="kv_lengths")
        self.refuse("run", good, "--options", "dropout=1.5", says="dropout")
        self.refuse("run", good, "--options", "softcap=nan", says="softcap")
        bad = {
            "k": ("F32", numbers(random.Random(1), 2, 5, 3, 8)),
            "v": ("F16", tensors["v"][1]),
            "mask": ("BOOL", [[[[True] * 4]]]),
            "bias": ("I32", [[[[1] * 5]]]),
            "kv_lengths": ("I32", [-1, 5]),
            "q_lengths": ("I64", [2**40, 1]),
            "sink": ("F32", [0.0]),
            "cu_seqlens_q": ("I32", [0, 3]),
        }
        for name, tensor in bad.items():
            with self.subTest(name=name):
                self.refuse("run", self.file({**tensors, name: tensor}, "bad.safetensors"), says="bad.safetensors: ")
        self.refuse("run", self.file({"q": tensors["q"]}, "bad.safetensors"), says="no tensor 'k'")

    def test_names_that_would_steer_a_terminal_are_shown_escaped(self):
        name = self.path("\x1b[31m\r\n")
        self.refuse("run", name, says=self.path(r"\x1b[31m\x0d\x0a") + ": No such file")
        self.refuse("explain", LINE, "--backend", "\x1b[31m", says="backend '?[31m' is unknown")
        self.file(self.tensors(), "\x1b[31m\r\n")
        self.assertIn(r"\x1b[31m\x0d\x0a", self.fovea("run", name, "--out", self.path("\x1b[32m")))

    def test_names_that_are_no_utf8_do_no_harm(self):
        path = os.fsencode(self.file(self.tensors())) + b"\xff"
        os.rename(path[:-1], path)
        done = subprocess.run([FOVEA, "run", path, "--json"], capture_output=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        json.loads(done.stdout)

    def test_random_problems_can_be_listed_and_kept_to_few_kinds(self):
        lines = self.fovea("check", "--random", "40", "--kinds", "2", "--list").splitlines()
        self.assertEqual(len(lines), 40)
        kinds = {tuple(word for word in line.split() if word[:2] in ("fw", "bw", "fp", "bf")) for line in lines}
        self.assertLessEqual(len(kinds), 2)
        self.assertEqual(len(set(lines)), 40)
        self.refuse("check", "--random", "4", "--kinds", "0", says="--kinds")

    def test_devices_that_are_not_there_are_refused(self):
        source = self.file(self.tensors())
        self.refuse("run", source, "--device", "sm_90", says="sm_90")
        for command in (("run", source), ("bench", LINE), ("check", LINE)):
            if GPUS:
                self.refuse(*command, "--device", f"cuda:{GPUS}", says=f"cuda:{GPUS} is not there")
            else:
                self.refuse(*command, "--device", "cuda:0", says="driver", code=3)
        self.refuse("run", source, "--device", "tpu", says="'tpu'")
        for device in ("sm_", "sm_0", "sm_a", "sm_80a", "sm_90b", "sm_90aa"):
            self.refuse("explain", LINE, "--device", device, says=f"'{device}'")

    def test_files_cut_short_or_hostile_are_refused(self):
        whole = Path(self.file(self.tensors(batch=1, sq=1, skv=1, hq=1, hkv=1, d=1, dv=1))).read_bytes()
        for size in range(0, len(whole), 7):
            Path(self.path("cut")).write_bytes(whole[:size])
            self.refuse("run", self.path("cut"), says="cut: ")
        hostile = [b"\xff" * 64, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 4) + b"\xff\xfe{}", b"\0" * 100]
        hostile.append(struct.pack("<Q", 10**6) + b"[" * 10**6)
        hostile.append(whole + b"more")
        for content in hostile:
            Path(self.path("bad")).write_bytes(content)
            self.refuse("run", self.path("bad"), says="bad: ")

    def test_outputs_that_cant_be_written_are_refused_before_any_work(self):
        source = self.file(self.tensors())
        for option in ("--out", "--plot"):
            self.refuse("run", source, option, self.path("no/such/folder"), says="no/such/folder")
            self.refuse("run", source, option, self.folder, says="not a regular file")
            self.refuse("run", source, option, "/dev/null", says="not a regular file")
            self.refuse("run", source, option, "", code=2)
        for option in ("--out", "--plot"):
            self.refuse("run", "--problem", TOO_LARGE, option, self.path("no/such/folder"), says="no/such/folder")
        for option in ("--json", "--html"):
            self.refuse("bench", TOO_LARGE, option, self.path("no/such/folder"), says="no/such/folder")

    def test_one_file_does_not_take_two_outputs(self):
        one, same = self.path("one"), self.path("./one")
        for words, option, other in (
            (("run", "--problem", LINE), "--out", "--plot"),
            (("bench", LINE, "--seconds", "0.001"), "--json", "--html"),
            (("ladder", "--seqlen", "16", "--rungs", "0", "--seconds", "0.001"), "--json", "--html"),
            (("precompile", LINE, "--arch", "sm_80"), "--out", "--table"),
        ):
            self.refuse(*words, option, one, other, same, says=f"{option} '{one}' and {other} '{same}' are one file; name two")
        self.refuse("run", "--problem", LINE, "--out", one, "--plot", one, says="are one file")

    def test_outputs_never_replace_the_inputs(self):
        source = self.file(self.tensors())
        os.symlink(source, self.path("link"))
        whole = Path(source).read_bytes()
        for option in ("--out", "--plot"):
            for name in (source, self.path("link"), self.path("./in.safetensors")):
                self.refuse("run", source, option, name, says=f"{option} '{name}' is a file that is read")
        words = []
        for name, (_, values) in self.tensors().items():
            write_npy(self.path(name + ".npy"), "<f4", values)
            words += ["--" + name, self.path(name + ".npy")]
        self.refuse("run", *words, "--out", self.path("k.npy"), says="k.npy' is a file that is read")
        self.assertEqual(Path(source).read_bytes(), whole)
        lines = Path(self.path("lines"))
        lines.write_text(LINE)
        for words, options in ((("bench", "--repeat", 1), ("--json", "--html")), (("precompile", "--arch", "sm_80", "--check"), ("--out", "--table"))):
            for option in options:
                self.refuse(*words, f"@{lines}", option, self.path("./lines"), says=f"{option} '{self.path('./lines')}' is a file that is read")
        self.refuse("precompile", LINE, "--arch", "sm_80", "--check", "--known-spills", lines, "--table", lines, says="is a file that is read")
        self.assertEqual(lines.read_text(), LINE)

    def test_memory_that_is_not_there_is_a_failure_of_the_system(self):
        for command in (("run", "--problem"), ("bench",), ("check",)):
            self.refuse(*command, TOO_LARGE, code=3)


class Explain(CommandTest):
    def test_both_passes_say_who_runs_them(self):
        text = self.fovea("explain", "fwd+bwd bf16 b2 hq16 hkv4 sq4096 d128 causal=bottom_right")
        for word in ("forward", "backward", "workspace", "cpu"):
            self.assertIn(word, text)
        reports = json.loads(self.fovea("explain", "fwd+bwd fp32 b1 hq1 sq8 d8", "--json"))
        self.assertEqual([r["problem"].split()[0] for r in reports], ["fwd", "bwd"])
        for report in reports:
            chosen = [v for v in report["verdicts"] if v["backend"] == report["backend"]]
            self.assertEqual(chosen[0]["reasons"], [])
        self.assertEqual(len(json.loads(self.fovea("explain", LINE, "--json"))), 1)

    def test_a_gpu_needs_not_be_there(self):
        for device in ("sm_90", "sm_90a", "sm_80", "sm_120a"):
            (report,) = json.loads(self.fovea("explain", LINE, "--device", device, "--json"))
            self.assertEqual(report["device"], device.removesuffix("a"))
            self.assertEqual(report["backend"], "cuda_portable")
            self.assertIn("forward_fp32", report["details"]["kernel"])
            self.assertRegex(report["details"]["tile"], r"^\d+ rows × \d+ keys")

    def test_where_nobody_runs_it_everybody_says_why(self):
        for device in ("sm_60", "cuda:99"):
            (report,) = json.loads(self.fovea("explain", LINE, "--device", device, "--json"))
            self.assertEqual(report["device"], device)
            self.assertIsNone(report["backend"])
            self.assertGreater(len(report["verdicts"]), 0)
            for verdict in report["verdicts"]:
                self.assertNotEqual(verdict["reasons"], [])
            self.assertIn("nobody", self.fovea("explain", LINE, "--device", device))

    def test_lines_of_a_file_are_explained_one_by_one(self):
        Path(self.path("lines")).write_text(f"# problems\n\n{LINE}  # one\r\nbwd fp16 b1 hq1 sq8 d8\n")
        self.assertEqual(len(json.loads(self.fovea("explain", "@" + self.path("lines"), "--json"))), 2)
        Path(self.path("mark")).write_text(LINE, encoding="utf-8-sig")
        self.assertEqual(self.fovea("explain", "@" + self.path("mark")), self.fovea("explain", LINE))
        Path(self.path("empty")).write_text("# nothing\n")
        self.refuse("explain", "@" + self.path("empty"), says="no problem line")
        self.refuse("explain", "@" + self.path("absent"), says="absent")
        Path(self.path("wrong")).write_text(f"{LINE}\n\n# next\nfwd fp32 b1 sq4 d8\n")
        for command in ("explain", "check", "bench", "precompile --check --arch sm_90"):
            self.refuse(*command.split(), "@" + self.path("wrong"), says=self.path("wrong") + ":4: token 'hq' is missing")

    def test_lines_that_are_wrong_are_refused(self):
        self.refuse("explain", "fwd fp32 b1 hq3 hkv2 sq8 d8", says="num_q_heads")
        self.refuse("explain", "fwd fp64 b1 hq1 sq8 d8", says="fp64")
        self.refuse("explain", LINE + " colour=red", says="colour=red")
        self.refuse("explain", "fwd fp32 b1 hq1 sq99999999999999999999 d8", says="sq99999999999999999999")

    def test_the_pinned_instruction_set_runs_it(self):
        (report,) = json.loads(self.fovea("explain", LINE, "--json", env={"FOVEA_CPU_ISA": "portable"}))
        self.assertEqual(report["backend"], "cpu_portable")
        self.refuse("explain", LINE, "--strict", "--backend", "nobody", says="nobody")


class Check(CommandTest):
    def test_right_results_pass(self):
        text = self.fovea("check", LINE, "bwd bf16 b1 hq2 hkv1 sq5 skv9 d16 causal=top_left")
        self.assertEqual(text.count("ok"), 2)
        self.fovea("check", "--random", 5, "--seed", 3)
        self.assertRegex(self.fovea("check", LINE), r"\n1 problem, 0 violations in .*; \w+ ran 1 pass\n")

    def test_what_does_not_run_is_a_failed_check(self):
        self.fovea("check", LINE, "--backend", "cpu_portable", code=1, env={"FOVEA_CPU_ISA": "avx2"})

    def test_names_that_nobody_knows_are_refused(self):
        self.refuse("check", LINE, "--backend", "foo", says="backend 'foo' is unknown")
        self.refuse("check", LINE, env={"FOVEA_CPU_ISA": "foo"}, says="FOVEA_CPU_ISA ('foo')")

    def test_memory_that_runs_out_is_a_failure_of_the_system(self):
        limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
        line = "fwd fp32 b1 hq16 sq1 skv1000000 d64"
        for jobs in ("1", "2"):
            done = subprocess.run([FOVEA, "check", line, "--jobs", jobs], preexec_fn=limit, capture_output=True, text=True, timeout=60)
            self.assertEqual((done.returncode, done.stdout), (3, ""))
            self.assertRegex(done.stderr, r"^fovea: fwd fp32 b1 hq16 .*: memory ran out; .*\n$")

    def test_nothing_to_check_is_refused(self):
        self.refuse("check", says="nothing to check")
        self.refuse("check", "fwd fp32 b1 sq8 d8", says="hq")


class Bench(CommandTest):
    def test_numbers_come_as_table_json_and_page(self):
        words = ("bench", "fwd+bwd fp32 b1 hq2 sq64 d16", "--seconds", "0.02", "--json", self.path("b.json"), "--html", self.path("b.html"))
        text = self.fovea(*words)
        for word in ("forward", "backward", "GFLOP/s", "GB/s", "FMA", "p90", "%"):
            self.assertIn(word, text)
        page = json.loads(Path(self.path("b.json")).read_text())
        self.assertEqual([r["pass"] for r in page["results"]], ["forward", "backward"])
        for r in page["results"]:
            self.assertLessEqual(r["min_seconds"], r["p10_seconds"])
            self.assertLessEqual(r["p10_seconds"], r["median_seconds"])
            self.assertLessEqual(r["median_seconds"], r["p90_seconds"])
            self.assertGreater(r["fma_gflops"], 0)
            self.assertAlmostEqual(r["percent_of_fma"], 100 * r["gflops"] / r["fma_gflops"], places=6)
        forward, backward = page["results"]
        self.assertAlmostEqual(forward["gflops"] * forward["median_seconds"], 2 * (16 + 16) * 64 * 64 * 2 / 1e9)
        self.assertAlmostEqual(backward["gflops"] * backward["median_seconds"], 2.5 * 2 * (16 + 16) * 64 * 64 * 2 / 1e9)
        self.assertIn("<html", Path(self.path("b.html")).read_text(encoding="utf-8"))

    def test_another_backend_runs_in_turns(self):
        page = json.loads(self.fovea("bench", LINE, "--repeat", 5, "--against", "reference", "--json", "-"))
        first, second = page["results"]
        self.assertEqual(second["backend"], "reference")
        self.assertEqual(second["against"], first["backend"])
        self.assertEqual((first["runs"], second["runs"]), (5, 5))
        self.assertAlmostEqual(second["time_ratio"], second["median_seconds"] / first["median_seconds"])
        self.assertIn("×", self.fovea("bench", LINE, "--repeat", 3, "--against", "reference"))
        self.refuse("bench", LINE, "--against", "rocket", says="rocket")
        self.refuse("bench", LINE, "--against", "", says="--against: the name is empty; name a backend")

    def test_the_word_after_another_backend_is_the_line(self):
        words = ("--against", "reference", "--against", "cpu_portable", LINE, "--repeat", 2, "--json", "-")
        backends = [result["backend"] for result in json.loads(self.fovea("bench", *words))["results"]]
        self.assertEqual(backends[1:], ["reference", "cpu_portable"])

    def test_nothing_is_measured_where_a_line_is_wrong(self):
        self.refuse("bench", LINE, "fwd fp32 b1 sq8 d8", says="hq")


class Precompile(CommandTest):
    def test_what_is_wrong_around_kernels_is_no_fault_of_theirs(self):
        for words in (("--out", self.path("k.pack")), ("--check",)):
            words = ("precompile", LINE, "--arch", "sm_90a", *words)
            with tempfile.TemporaryDirectory() as folder:
                env = {"FOVEA_CACHE_DIR": folder, "FOVEA_NVRTC": "/nonexistent", "FOVEA_JIT": "on"}
                self.refuse(*words, env={**env, "FOVEA_JIT": "foo"}, says="FOVEA_JIT ('foo') must be on, cache or off")
                self.refuse(*words, env={**env, "FOVEA_JIT": "cache"}, says="FOVEA_JIT=cache forbids compiling it")
                self.refuse(*words, env=env, says="FOVEA_NVRTC names '/nonexistent'", code=3)

    def test_compiling_beyond_its_limits_is_a_fault(self):
        if json.loads(self.fovea("doctor", "--json"))["cuda"]["nvrtc"] is None:
            self.skipTest("there is no NVRTC")
        words = ("precompile", LINE, "--arch", "sm_80", "--check", "--most", "1")
        with tempfile.TemporaryDirectory() as folder:
            env = {"FOVEA_CACHE_DIR": folder, "FOVEA_JIT": "on"}
            text = self.fovea(*words, "--most-seconds", "0.0001", "--median-seconds", "0.0001", code=1, env=env)
            self.assertRegex(text, r"took .* to compile, more than 0.0001 s")
            self.assertIn("the median is more than 0.0001 s", text)
            self.fovea(*words, "--most-seconds", "3600", "--median-seconds", "3600", env=env)


class Doctor(CommandTest):
    def test_a_pack_where_it_is_called_is_not_the_one_beside_it(self):
        (self.folder / "fovea.pack").write_text("no pack")
        path = f"{Path(FOVEA).resolve().parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(["fovea", "doctor"], cwd=self.folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_it_tells_what_is_there(self):
        text = self.fovea("doctor")
        for word in ("processor", "threads", "multiply-add", "CUDA driver", "NVRTC", "cpu_portable", "reference"):
            self.assertIn(word, text)
        page = json.loads(self.fovea("doctor", "--json"))
        self.assertIn("portable", page["fma_gflops"])
        for rate in page["fma_gflops"].values():
            self.assertGreater(rate["one_thread"], 0)
        self.assertEqual(page["backends"]["cpu_portable"]["fwd fp32"], [])

    def test_it_tells_of_the_compiler_and_the_cache(self):
        with tempfile.TemporaryDirectory() as folder:
            env = {"FOVEA_NVRTC": "/dev/null", "FOVEA_CACHE_DIR": folder, "FOVEA_JIT": "cache"}
            cuda = json.loads(self.fovea("doctor", "--json", env=env))["cuda"]
            self.assertIsNone(cuda["nvrtc"])
            self.assertIn("FOVEA_NVRTC names '/dev/null'", cuda["nvrtc_problem"])
            self.assertEqual(cuda["cache"], {"folder": folder, "writable": True, "kernels": 0, "bytes": 0})
            self.assertEqual(cuda["FOVEA_JIT"], "cache")
            text = self.fovea("doctor", env=env)
            self.assertIn(f"0, 0 B in {folder}", text)
            self.assertIn("no kernel is compiled", text)

    def test_it_tells_of_variables_that_stop_all_else(self):
        page = json.loads(self.fovea("doctor", "--json", env={"FOVEA_CPU_ISA": "foo", "FOVEA_PACK": "/dev/null"}))
        self.assertIn("FOVEA_CPU_ISA ('foo') is no instruction set", page["backends"]["cpu_portable"]["fwd fp32"][0])
        self.assertIn("pack /dev/null cannot be read", page["cuda"]["cache_problem"])
        text = self.fovea("doctor", env={"FOVEA_CPU_ISA": "foo", "FOVEA_JIT": "foo"})
        for words in ("FOVEA_CPU_ISA ('foo') is no instruction set", "FOVEA_JIT ('foo') must be on, cache or off"):
            self.assertIn(words, text)

    def test_a_pinned_instruction_set_makes_the_others_refuse(self):
        page = json.loads(self.fovea("doctor", "--json", env={"FOVEA_CPU_ISA": "portable"}))
        self.assertEqual(page["FOVEA_CPU_ISA"], "portable")
        for backend, answers in page["backends"].items():
            if backend in ("cpu_avx2", "cpu_avx512"):
                self.assertNotEqual(answers["fwd bf16"], [])


class Ladder(CommandTest):
    def test_it_climbs_all_rungs(self):
        numbers, picture = self.path("ladder.json"), self.path("ladder.html")
        text = self.fovea("ladder", "--seqlen", "64,128", "--mask", "full,causal", "--dim", "32", "--repeat", "2", "--json", numbers, "--html", picture)
        self.assertEqual(text.count("right in 6 problems"), 6)
        page = json.loads(Path(numbers).read_text())
        self.assertEqual([check["wrong"] for check in page["checks"]], [0] * 6)
        self.assertEqual(len(page["results"]), 6 * 2 * 2 * 2)  # rungs, lengths, masks, passes
        for result in page["results"]:
            self.assertGreater(result["median_seconds"], 0)
            self.assertEqual("moved_bytes" in result, result["rung"] < 4)
            if result["rung"] == 0 and result["seqlen"] == 128:  # S and P in fp32, of 4 heads
                self.assertEqual(result["extra_bytes"], 2 * 4 * 128 * 128 * 4)
        self.assertIn("FlashAttention-2", Path(picture).read_text())

    def test_a_rung_that_runs_out_of_memory_says_so(self):
        numbers = self.path("ladder.json")
        text = self.fovea("ladder", "--rungs", "0", "--seqlen", "4000000", "--heads", "1", "--dim", "1", "--json", numbers)
        self.assertIn("out of memory: it needs 116 TiB beside its tensors", text)
        for result in json.loads(Path(numbers).read_text())["results"]:
            self.assertIn("out of memory", result["skipped"])
            self.assertNotIn("median_seconds", result)

    def test_check_measures_nothing(self):
        text = self.fovea("ladder", "--check", "--rungs", "1,3", "--dim", "64,24")
        self.assertEqual(text.count("right in 12 problems"), 2)
        self.assertNotIn("GFLOP/s", text)

    def test_what_is_not_shown_is_not_run(self):
        text = self.fovea("ladder", "--check", "--dtype", "bf16")
        self.assertEqual(text.count("  not run  "), 4)
        self.assertEqual(text.count("right in 6 problems"), 2)
        self.assertEqual(text.count("on a CPU the ladder takes fp32"), 4)

    def test_what_is_not_run_is_said_once_and_not_measured(self):
        numbers = self.path("ladder.json")
        words = ("ladder", "--seqlen", "16,32", "--repeat", "1", "--dim", "8", "--json", numbers)
        text = self.fovea(*words, "--dtype", "bf16")
        self.assertEqual(text.count("on a CPU the ladder takes fp32"), 4)
        page = json.loads(Path(numbers).read_text())
        self.assertEqual({result["rung"] for result in page["results"]}, {4, 5})
        self.assertEqual(sum("on a CPU the ladder takes fp32" in check.get("skipped", "") for check in page["checks"]), 4)
        text = self.fovea(*words, "--dtype", "fp32,bf16", "--rungs", "0,5")
        self.assertEqual(text.count("on a CPU the ladder takes fp32"), 1 + 2)  # of the checks, and of each length
        self.assertNotIn(" 0 B ", text)

    def test_refusals(self):
        self.refuse("ladder", "--rungs", "0,3", "--dtype", "bf16", says="on a CPU the ladder takes fp32")
        self.refuse("ladder", "--mask", "diagonal", says="--mask 'diagonal' is unknown; use full, causal or both")
        self.refuse("ladder", "--dtype", "fp8", says="--dtype 'fp8' is unknown; use fp32, fp16 or bf16")
        self.refuse("ladder", "--rungs", "6", says="6")
        self.refuse("ladder", "--device", "sm_90", says="sm_90")
        self.refuse("ladder", "--seconds", "0", says="--seconds (0)")
        self.refuse("ladder", "--html", self.path("no/such/folder.html"), says="written")
        for option in ("--json", "--html"):  # there would be nothing in them
            self.refuse("ladder", "--check", option, self.path("page"), says=f"--check excludes {option}")


class OnATerminal(CommandTest):
    def on_terminal(self, *words, env=None):
        """What a terminal shows of the command."""
        main, side = pty.openpty()
        done = subprocess.Popen([FOVEA, *words], stdin=side, stdout=side, stderr=side, env={**os.environ, "TERM": "xterm", **(env or {})})
        os.close(side)
        shown = b""
        while True:
            try:
                part = os.read(main, 65536)
            except OSError:
                break
            if not part:
                break
            shown += part
        os.close(main)
        self.assertEqual(done.wait(timeout=60), 0)
        return shown.decode()

    def test_colours_are_shown_unless_refused(self):
        self.assertIn("\x1b[", self.on_terminal("explain", LINE, env={"NO_COLOR": ""}))
        self.assertNotIn("\x1b", self.on_terminal("explain", LINE, env={"NO_COLOR": "1"}))
        self.assertNotIn("\x1b", self.on_terminal("bench", LINE, "--repeat", "3", env={"TERM": "dumb"}))

    def test_progress_wipes_itself_away(self):
        shown = self.on_terminal("bench", LINE, "--seconds", "0.3")
        self.assertIn("%", shown)
        self.assertRegex(shown.rsplit("1/1 forward", 1)[1], r"^(\x1b\[0m)?\r\x1b\[2K")
        self.assertEqual(json.loads(self.on_terminal("bench", LINE, "--repeat", "3", "--json", "-", env={"TERM": "dumb"}))["threads"] > 0, True)


if __name__ == "__main__":
    unittest.main(verbosity=1)
