#!/usr/bin/env python3
"""Opens the command's two pages in headless Chromium and reads what is rendered.

    python3 tests/picture_test.py build/fovea

Speaks WebDriver to chromedriver with Python's own library.  Exit 77 (skipped) where there is no Chromium.
"""

import json
import math
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request

SAMPLE = pathlib.Path(__file__).resolve().parents[1] / "examples/data/minilm.safetensors"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name that the WebDriver standard gives to an element
KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015", "escape": "\ue00c", "end": "\ue010"}
COMMAND = ""


class Browser:
    """One headless Chromium behind chromedriver."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.driver = subprocess.Popen(
            [shutil.which("chromedriver"), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.root = f"http://127.0.0.1:{port}"
        self.wait(lambda: self.call("GET", "/status")["ready"])
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000", "--hide-scrollbars"]
        arguments += ["--disable-dev-shm-usage", "--proxy-server=127.0.0.1:9"]
        options = {"args": arguments, "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.root += f"/session/{session['sessionId']}"

    def close(self):
        try:
            self.call("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()

    def call(self, method, path, body=None):
        data = json.dumps(body if body is not None else {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.read().decode()}") from None

    @staticmethod
    def wait(condition, seconds=30):
        end = time.monotonic() + seconds
        while True:
            try:
                if condition():
                    return
            except OSError:  # chromedriver is still starting
                pass
            if time.monotonic() > end:
                raise AssertionError("waited too long")
            time.sleep(0.05)

    def open(self, path, hash_text=""):
        self.take_logs()
        self.call("POST", "/url", {"url": "about:blank"})
        self.call("POST", "/url", {"url": pathlib.Path(path).as_uri() + hash_text})
        # On a busy machine the driver has been seen to answer before the page's scripts had run.
        deadline = time.monotonic() + 60
        while not self.run("return location.protocol === 'file:' && document.readyState === 'complete'"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} has not finished loading after 60 s")
            time.sleep(0.05)

    def run(self, script, *arguments):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector):
        return self.call("POST", "/element", {"using": "css selector", "value": selector})

    def texts(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].map((n) => n.textContent)", selector)

    def text(self, selector):
        (text,) = self.texts(selector)
        return text

    def attributes(self, selector, name):
        script = "return [...document.querySelectorAll(arguments[0])].map((n) => n.getAttribute(arguments[1]))"
        return self.run(script, selector, name)

    def act(self, *actions):
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": list(actions)}
        self.call("POST", "/actions", {"actions": [pointer]})

    def hover(self, selector, x=0, y=0):
        """Moves the pointer to a point given from the middle of an element."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        self.act({"type": "pointerMove", "origin": self.find(selector), "x": x, "y": y, "duration": 0})

    def click(self, selector):
        self.hover(selector)
        self.act({"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0})

    def press(self, *names):
        keys = [{"type": kind, "value": KEYS.get(n, n)} for n in names for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": keys}]})

    def resize(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)

    def devtools(self, command, parameters):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def take_logs(self):
        """What the console said, and every address that was asked for."""
        console = [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]
        events = [json.loads(e["message"])["message"] for e in self.call("POST", "/se/log", {"type": "performance"})]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return console, asked


def fovea(*arguments):
    done = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise AssertionError(f"fovea {arguments}: exit {done.returncode}\n{done.stderr}")
    return done.stdout


def write_safetensors(path, tensors, metadata):
    """tensors: {name: (shape, flat values)}, all fp32."""
    header, blobs, offset = {"__metadata__": metadata}, [], 0
    for name, (shape, values) in tensors.items():
        blobs.append(struct.pack(f"<{len(values)}f", *values))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + len(blobs[-1])]}
        offset += len(blobs[-1])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


class Sample:
    """The real sample, and its weights computed here from the formula."""

    def __init__(self):
        data = SAMPLE.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        self.metadata = header["__metadata__"]
        self.tokens = json.loads(self.metadata["tokens"])
        _, self.seqlen, self.heads, self.head_dim = header["q"]["shape"]
        count = self.seqlen * self.heads * self.head_dim
        self.q, self.k = (
            struct.unpack_from(f"<{count}f", data, 8 + length + header[name]["data_offsets"][0]) for name in "qk"
        )

    def vector(self, of, i, head):
        begin = (i * self.heads + head) * self.head_dim
        return of[begin : begin + self.head_dim]

    def row(self, head, i, keys=None):
        q = self.vector(self.q, i, head)
        products = (zip(q, self.vector(self.k, j, head)) for j in range(self.seqlen if keys is None else keys))
        powers = [math.exp(sum(a * b for a, b in pairs) / math.sqrt(self.head_dim)) for pairs in products]
        return [p / math.fsum(powers) for p in powers]

    def column(self, head, j):
        return [self.row(head, i)[j] for i in range(self.seqlen)]


class PageTest(unittest.TestCase):
    """One browser for all; every test ends by asking whether the page kept to itself."""

    @classmethod
    def setUpClass(cls):
        cls.folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory(prefix="fovea_pages_")))
        cls.browser = Browser()
        cls.addClassCleanup(cls.browser.close)

    def setUp(self):
        self.browser.resize(1300, 1000)

    def tearDown(self):
        console, asked = self.browser.take_logs()
        self.assertEqual(console, [])
        self.assertTrue(asked)
        for address in asked:
            self.assertRegex(address, r"^(file://.*\.html(#.*)?|about:blank.*|data:,)$")

    def check_layout(self):
        """Nothing sticks out, on a desk or in a hand."""
        for width in (1300, 760, 360):
            self.browser.resize(width, 1000)
            self.browser.run("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            self.assertLessEqual(self.browser.run("return document.scrollingElement.scrollWidth"), width)
            sizes = self.browser.run("return [...document.querySelectorAll('h1, canvas, svg, button')].map((n) => n.clientWidth)")
            self.assertLessEqual(max(sizes), width)

    def check_theme(self):
        """Light and dark are the reader's choice, and the text is legible in both."""
        colours = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        seen = []
        for _ in range(2):
            self.browser.click("#theme")
            ink, paper = (
                sum(map(int, c.removeprefix("rgb(").removesuffix(")").split(","))) for c in self.browser.run(colours)
            )
            self.assertGreater(abs(ink - paper), 400)
            seen.append(ink > paper)
        self.assertEqual(sorted(seen), [False, True])


class AttentionPage(PageTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.sample = Sample()
        cls.page = cls.folder / "sample.html"
        fovea("run", SAMPLE, "--plot", cls.page)

    def readout(self):
        """{index: weight} as the page lists them, largest first."""
        indices = self.browser.attributes("#readout-list li", "data-index")
        weights = self.browser.attributes("#readout-list li", "data-weight")
        return {int(i): float(w) for i, w in zip(indices, weights, strict=True)}

    def assert_shows(self, expected):
        shown = self.readout()
        largest = sorted(expected, reverse=True)
        self.assertEqual(len(shown), min(16, len(expected)))
        self.assertEqual(list(shown.values()), sorted(shown.values(), reverse=True))
        for (index, weight), wanted in zip(shown.items(), largest):
            self.assertAlmostEqual(weight, wanted, delta=2e-5)
            self.assertAlmostEqual(weight, expected[index], delta=2e-5)
        values = self.browser.texts("#readout-list .value")
        for value, weight in zip(values, shown.values(), strict=True):
            self.assertEqual(value, f"{100 * weight:.2f} %" if weight >= 0.00005 else "< 0.01 %")

    def hover_cell(self, i, j, size):
        width, height = self.browser.run("const c = document.getElementById('canvas'); return [c.clientWidth, c.clientHeight]")
        offset = lambda at, length: round((at + 0.5) / size * length - length / 2)
        self.browser.hover("#canvas", offset(j, width), offset(i, height))

    def test_shows_text_and_facts(self):
        self.browser.open(self.page)
        tokens = self.browser.texts(".token")
        self.assertEqual(tokens, [t.removeprefix("##") for t in self.sample.tokens])
        self.assertIn("so she was considering in her own mind (as well as she could,", self.browser.text("#text"))
        self.assertIn("daisies, when suddenly", self.browser.text("#text"))
        self.assertIn("fwd fp32 b1 hq12 hkv12 sq135 skv135 d32", self.browser.text("#facts"))

    def test_head_picker(self):
        self.browser.open(self.page)
        picture = "return document.getElementById('canvas').toDataURL()"
        before = self.browser.run(picture)
        self.assertEqual(self.browser.text("#head-name"), "Head 0")
        self.assertEqual(len(self.browser.attributes("#heads button", "data-head")), self.sample.heads)
        self.browser.click('#heads [data-head="9"]')
        self.assertEqual(self.browser.text("#head-name"), "Head 9")
        chosen = self.browser.attributes('#heads [aria-checked="true"]', "data-head")
        self.assertEqual(chosen, ["9"])
        self.assertNotEqual(self.browser.run(picture), before)
        self.assertIn("the same word", self.browser.text("#head-note"))

    def test_map_is_darker_where_the_weight_is_larger(self):
        self.browser.open(self.page, "#head=11")
        self.browser.run("if (document.documentElement.dataset.theme === 'dark') document.getElementById('theme').click()")
        brightness = """
            const c = document.getElementById("canvas"), n = arguments[0];
            const pixels = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
            const at = (i, size) => Math.floor((i + 0.5) * size / n);
            return arguments[1].map(([i, j]) => {
                const begin = 4 * (at(i, c.height) * c.width + at(j, c.width));
                return pixels[begin] + pixels[begin + 1] + pixels[begin + 2];
            });"""
        rows = {i: self.sample.row(11, i) for i in (7, 60, 120)}
        places = [(i, j) for i in rows for j in range(self.sample.seqlen)]
        found = self.browser.run(brightness, self.sample.seqlen, places)
        by_weight = sorted(zip((rows[i][j] for i, j in places), found))
        levels = [b for _, b in by_weight]
        for darker, lighter in zip(levels[1:], levels):
            self.assertLessEqual(darker, lighter + 3)  # colours are rounded
        self.assertGreater(levels[0] - levels[-1], 400)

    def test_hovered_token_shows_its_weights(self):
        self.browser.open(self.page)
        for head, token in ((0, 1), (9, 57), (11, 134)):
            self.browser.click(f'#heads [data-head="{head}"]')
            self.browser.hover(f'.token[data-index="{token}"]')
            word = self.sample.tokens[token]
            self.assertEqual(self.browser.text("#readout-title"), f"{word} looks at")
            self.assert_shows(self.sample.row(head, token))
            tops = self.readout()
            names = self.browser.texts("#readout-list .name")
            for name, index in zip(names, tops, strict=True):
                self.assertEqual(name, self.sample.tokens[index].removeprefix("##") + str(index))

    def test_hovered_token_colours_the_text(self):
        self.browser.open(self.page, "#head=9")
        self.browser.hover('.token[data-index="67"]')
        row = self.sample.row(9, 67)
        painted = self.browser.run("return [...document.querySelectorAll('.token')].map((n) => n.style.background !== '')")
        for weight, is_painted in zip(row, painted):
            if not math.isclose(weight / max(row), 0.002, rel_tol=0.05):
                self.assertEqual(is_painted, weight / max(row) > 0.002)
        self.assertTrue(any(painted) and not all(self.browser.run(
            "return [...document.querySelectorAll('.token')].map((n) => n.classList.contains('current'))")))

    def test_other_direction(self):
        self.browser.open(self.page, "#head=4")
        self.browser.click('#sides [data-side="kv"]')
        self.browser.hover('.token[data-index="57"]')
        self.assertEqual(self.browser.text("#readout-title"), "book is looked at by")
        self.assert_shows(self.sample.column(4, 57))

    def test_hovered_cell_shows_its_weight(self):
        self.browser.open(self.page, "#head=9")
        for i, j in ((66, 43), (10, 90), (134, 0)):
            self.hover_cell(i, j, self.sample.seqlen)
            weight = self.sample.row(9, i)[j]
            words = [self.sample.tokens[t].removeprefix("##") for t in (i, j)]
            shown = self.browser.text("#tip")
            self.assertTrue(shown.startswith(f"{words[0]} → {words[1]} "), shown)
            self.assertAlmostEqual(float(shown.removesuffix(" %").split()[-1]) / 100, weight, delta=7e-5)
            self.assert_shows(self.sample.row(9, i))

    def test_click_keeps_a_token(self):
        self.browser.open(self.page)
        self.browser.click('.token[data-index="57"]')
        self.browser.hover('.token[data-index="3"]')
        self.assertEqual(self.browser.text("#readout-title"), "book looks at")
        self.assertIn("token=57", self.browser.run("return location.hash"))
        self.browser.press("escape")
        self.browser.hover('.token[data-index="4"]')
        self.assertEqual(self.browser.text("#readout-title"), "to looks at")

    def test_link_opens_the_place(self):
        self.browser.open(self.page, "#head=3&side=kv&token=57")
        self.assertEqual(self.browser.text("#head-name"), "Head 3")
        self.assertEqual(self.browser.text("#readout-title"), "book is looked at by")
        self.browser.open(self.page, "#head=99&side=no&token=1e9")  # nonsense is passed over
        self.assertEqual(self.browser.text("#head-name"), "Head 0")

    def test_keyboard(self):
        self.browser.open(self.page)
        self.browser.run("document.querySelector('#heads [tabindex=\"0\"]').focus()")
        self.browser.press("right", "right")
        self.assertEqual(self.browser.text("#head-name"), "Head 2")
        self.browser.press("end")
        self.assertEqual(self.browser.text("#head-name"), "Head 11")
        self.browser.run("document.querySelector('.token[tabindex=\"0\"]').focus()")
        at = self.browser.run("return Number(document.activeElement.dataset.index)")
        self.browser.press("right", "right", "left")
        self.assertEqual(self.browser.text("#readout-title"), f"{self.sample.tokens[at + 1]} looks at")
        self.assert_shows(self.sample.row(11, at + 1))
        self.browser.run("document.getElementById('map').focus()")
        self.browser.press("down", "right", "right")
        weight = self.sample.row(11, at + 2)[2]
        self.assertTrue(self.browser.text("#tip").endswith(f"{100 * weight:.2f} %" if weight >= 5e-5 else "< 0.01 %"))

    def test_hidden_keys_are_zero(self):
        page = self.folder / "causal.html"
        fovea("run", SAMPLE, "--options", "causal=top_left", "--plot", page)
        self.browser.open(page)
        self.browser.hover('.token[data-index="5"]')
        self.assert_shows(self.sample.row(0, 5, keys=6))
        self.hover_cell(5, 6, self.sample.seqlen)
        self.assertTrue(self.browser.text("#tip").endswith(" 0.00 %"))
        self.assertTrue(self.browser.run("return document.getElementById('zero-key').checkVisibility()"))

    def test_layout_and_colours(self):
        self.browser.open(self.page)
        self.check_theme()
        self.check_layout()

    def test_long_sequences_are_averaged_and_say_so(self):
        page = self.folder / "long.html"
        fovea("run", "--problem", "fwd fp32 b2 hq4 hkv2 sq900 skv1300 d16 causal=bottom_right", "--plot", page)
        self.browser.open(page)
        self.assertIn("each cell stands for 2 queries (their mean) and 3 keys (their sum)", self.browser.text("#about"))
        self.assertEqual(self.browser.texts("#text h3"), ["Queries", "Keys"])
        self.assertEqual(len(self.browser.texts('[data-side="kv"] .token')), 434)
        self.browser.hover('[data-side="q"] .token[data-index="1"]')
        self.assertEqual(self.browser.text("#readout-title"), "query 2–3 looks at")
        self.check_layout()

    def test_nothing_to_draw(self):
        page = self.folder / "empty.html"
        fovea("run", "--problem", "fwd fp32 b1 hq2 sq0 skv4 d8", "--plot", page)
        self.browser.open(page)
        self.assertIn("nothing to draw: seqlen_q is 0", self.browser.text("#about"))

    def test_rows_without_keys_and_nan(self):
        nan, path, page = math.nan, self.folder / "nan.safetensors", self.folder / "nan.html"
        shape, tensors = [1, 3, 1, 2], [1.0, 2.0, nan, 4.0, 5.0, 6.0]
        write_safetensors(path, {"q": (shape, tensors), "k": (shape, [1.0] * 6), "v": (shape, [1.0] * 6)}, {})
        fovea("run", path, "--options", "causal=top_left window=-,-", "--plot", page)
        self.browser.open(page)
        self.browser.hover('.token[data-index="1"]')
        self.assertIn("NaN", self.browser.text("#readout-note"))
        fovea("run", "--problem", "fwd fp32 b1 hq1 sq5 skv2 d8 causal=bottom_right", "--plot", page)
        self.browser.open(page)
        self.browser.hover('[data-side="q"] .token[data-index="0"]')
        self.assertIn("It sees no key: its output is 0.", self.browser.text("#readout-note"))

    def test_hostile_tokens_stay_text(self):
        tokens = ["</script><script>document.title = 'taken'</script>", "<img src=x onerror=alert(1)>", "&amp;@DATA@"]
        path, page = self.folder / "hostile.safetensors", self.folder / "hostile.html"
        values = [0.1 * i for i in range(6)]
        tensors = {name: ([1, 3, 1, 2], values) for name in "qkv"}
        write_safetensors(path, tensors, {"tokens": json.dumps(tokens), "title": tokens[0]})
        fovea("run", path, "--plot", page)
        self.browser.open(page)
        self.assertEqual(self.browser.texts(".token"), tokens)
        self.assertNotEqual(self.browser.run("return document.title"), "taken")
        self.browser.hover('.token[data-index="1"]')
        self.assertEqual(self.browser.text("#readout-title"), f"{tokens[1]} looks at")


class BenchPage(PageTest):
    LINES = ["fwd+bwd fp32 b1 hq2 sq64 d32", "fwd bf16 b1 hq4 hkv2 sq100 d16 causal=bottom_right dropout=0.1"]

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.page, numbers = cls.folder / "bench.html", cls.folder / "bench.json"
        fovea("bench", *cls.LINES, "--against", "reference", "--repeat", 3, "--html", cls.page, "--json", numbers)
        cls.results = json.loads(numbers.read_text())["results"]

    def setUp(self):
        super().setUp()
        self.browser.open(self.page)

    def column(self, name):
        at = self.browser.texts("#columns th").index(name) + 1
        return self.browser.texts(f"#rows td:nth-child({at})")

    def test_shows_each_row(self):
        self.assertEqual(len(self.results), 6)  # two passes and one, two backends
        self.assertEqual(self.column("Problem"), [r["problem"] for r in self.results])
        self.assertEqual(self.column("Pass"), [r["pass"] for r in self.results])
        self.assertEqual(self.column("Backend"), [r["backend"] for r in self.results])
        for shown, result in zip(self.column("GFLOP/s"), self.results, strict=True):
            rate = result["gflops"]
            self.assertAlmostEqual(float(shown.replace(",", "")) / rate, 1, delta=0.01)
        for shown, result in zip(self.column("% of rate"), self.results, strict=True):
            self.assertAlmostEqual(float(shown), result["percent_of_fma"], delta=0.051)
        self.assertEqual(self.browser.texts(".problem h3 span"), list(dict.fromkeys(r["problem"] for r in self.results)))
        self.assertIn("processor", self.browser.texts("#facts dt"))

    def test_bars_are_as_long_as_the_rates(self):
        measure = "return [...document.querySelectorAll('.measurement rect')].map((n) => Number(n.getAttribute('width')))"
        for unit, key in ((1, "gflops"), (2, "percent_of_fma")):
            self.browser.click(f"#units button:nth-child({unit})")
            widths = self.browser.run(measure)
            rates = [r[key] for r in self.results]
            scale = max(widths) / rates[widths.index(max(widths))]
            for width, rate in zip(widths, rates, strict=True):
                self.assertAlmostEqual(width, max(1, rate * scale), delta=0.01)

    def test_sorts_by_a_column(self):
        index = self.browser.texts("#columns th").index("GFLOP/s") + 1
        number = lambda text: float(text.replace(",", ""))
        for direction, reverse in (("descending", True), ("ascending", False)):
            self.browser.click(f"#columns th:nth-child({index}) button")
            self.assertEqual(self.browser.attributes("#columns th", "aria-sort")[index - 1], direction)
            values = [number(v) for v in self.column("GFLOP/s")]
            self.assertEqual(values, sorted(values, reverse=reverse))
            self.assertGreater(max(values), min(values))
        self.browser.click("#columns th:first-child button")
        self.assertEqual(self.column("Problem"), sorted(self.column("Problem")))

    def test_lines_can_be_copied(self):
        permission = {"permission": {"name": "clipboard-write"}, "setting": "granted"}
        self.browser.devtools("Browser.setPermission", permission)
        caught = "window.copied = []; navigator.clipboard.writeText = async (text) => { window.copied.push(text); }"
        self.browser.run(caught)
        self.browser.click("#rows tr:last-child .copy")
        self.browser.click(".problem .copy")
        self.browser.click("#copy-all")
        line, first, table = self.browser.run("return window.copied")
        self.assertEqual(line, f'fovea bench "{self.results[-1]["problem"]}"')
        self.assertEqual(first, f'fovea bench "{self.results[0]["problem"]}"')
        self.assertEqual(len(table.splitlines()), 1 + len(self.results))
        self.assertEqual(self.browser.text("#copy-all"), "Copied")
        fovea("explain", self.results[-1]["problem"])  # the command takes its own line back

    def test_layout_and_colours(self):
        self.check_theme()
        self.check_layout()


class LadderPage(PageTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.page, numbers = cls.folder / "ladder.html", cls.folder / "ladder.json"
        fovea("ladder", "--seqlen", "64,128", "--mask", "full,causal", "--repeat", 2, "--html", cls.page, "--json", numbers)
        cls.results = json.loads(numbers.read_text())["results"]

    def setUp(self):
        super().setUp()
        self.browser.open(self.page)

    def test_draws_a_line_a_rung(self):
        lines = "return [...document.querySelectorAll('.chart')].map((n) => n.querySelectorAll('path').length)"
        self.assertEqual(self.browser.run(lines), [6, 6, 6])
        self.assertEqual(len(self.browser.texts("#keys span")), 6)

    def test_shows_the_kind_that_is_picked(self):
        for at, mask in ((1, "full"), (2, "causal")):
            self.browser.click(f"#kinds button:nth-child({at})")
            wanted = [r for r in self.results if r["mask"] == mask]
            self.assertEqual(self.browser.texts("#rows td:nth-child(2)"), [r["pass"] for r in wanted])
            self.assertEqual(self.browser.texts("#rows td:nth-child(1)"), [f"{r['rung']} {r['name']}" for r in wanted])

    def test_layout_and_colours(self):
        self.check_theme()
        self.check_layout()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: picture_test.py path/to/fovea [unittest arguments]")
    COMMAND = sys.argv.pop(1)
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        print("skipped: chromium and chromedriver are not installed")
        sys.exit(77)
    unittest.main(verbosity=2)
