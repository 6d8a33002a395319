"""What the documents point at exists: linked files, headings and lines, and paths of this repository named in code style.
A linked line has the symbol that the link's text names in code style: [`Class::name`](file.h#L12).  A list of a page's
contents names all of its sections.

    python3 tests/docs_test.py [--fix]

--fix first writes into such links the line of the file in which the symbol is defined, or else declared or used; of several
it takes the nearest.  What it cannot mend, a symbol that its file no longer has, it leaves to the check.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("include", "src", "tools", "tests", "bench", "docs", "examples", "cmake", "python", ".ci")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
SYMBOL_LINK = re.compile(r"\[(`[^`\]]+`)\]\(([^)\s#]+)#L(\d+)\)")
CODE = re.compile(r"`((?:%s)/[^`\s]*)`" % "|".join(re.escape(folder) for folder in FOLDERS))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule: lower case, words joined by hyphens, punctuation dropped."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def left_out(page: Path) -> list[str]:
    """The sections that a page's list of contents, where there is one, does not name."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"^- \[([^\]]+)\]\(#", text, re.MULTILINE)
    return [section for section in re.findall(r"^## (.*)$", text, re.MULTILINE) if named and section not in named]


def symbol_of(text: str) -> tuple[str, str] | None:
    """The class and the name in a link's text `Class::name<T>()`; None where the text is no symbol but prose or a file."""
    owner, _, name = re.sub(r"<.*?>+|\(.*\)", "", text.strip("`")).rpartition("::")
    return (owner.rpartition("::")[2], name) if text.startswith("`") and re.fullmatch(r"[A-Za-z_]\w*", name) else None


def rank(line: str, name: str) -> int:
    """What a line that has `name` seems to be to it: 0 its definition, 1 a declaration, 2 a use, 3 a comment."""
    code = re.split(r"//|(?:^|\s)# ", line)[0].rstrip()
    at = re.search(rf"\b{name}\b", code)
    if not at:
        return 3
    head = re.sub(r"\[\[.*?\]\]|\b\w+\([^()]*\)+ ", "", code[:at.start()])  # without attributes
    tail = code[at.end():].lstrip()
    if re.search(r"(?:^|[^<,] |^\s+)(?:class|struct|union|enum|concept|namespace|using|def|#define) (?:class )?$", head):
        return 1 if tail == ";" else 0
    typed = re.fullmatch(r"\s*(?!(?:return|else|case|throw|new|delete)\b)[^=.(]*[\w>&*]\s+(?:\w+::)*", head)
    if not typed or not re.match(r"[(\[{=;,]|$", tail):
        return 2
    return 0 if tail.startswith("(") and not tail.endswith(";") else 1


def place_of(symbol: tuple[str, str], lines: list[str], near: int) -> int | None:
    """The number of the line where a symbol is defined, or else declared or used; of several in its class, the one nearest
    to line `near`."""
    owner, name = symbol
    scopes = []  # indentation and name of the classes around a line
    places = []
    for number, line in enumerate(lines, 1):
        indent = len(line) - len(line.lstrip())
        if line.strip() and not line.startswith("#"):
            scopes = [scope for scope in scopes if scope[0] < indent]
        if re.search(rf"\b{name}\b", line):
            outside = bool(owner) and f"{owner}::" not in line and (not scopes or scopes[-1][1] != owner)
            places.append((rank(line, name), outside, abs(number - near), number))
        if opened := re.match(r"\s*(?:class|struct) (?:alignas\(\w+\) )?(\w+)[^;]*$", line):
            scopes.append((indent, opened[1]))
    return min(places)[-1] if places else None


def fault(page: Path, text: str, target: str, base: Path) -> str | None:
    """Why `target`, named on `page` under a link's `text`, leads nowhere; None where it leads somewhere."""
    path, _, anchor = target.partition("#")
    path, _, line = path.partition(":")
    file = base / path if path else page
    if "*" in path:
        return None if any(base.glob(path)) else "matches no file"
    if not file.exists():
        return "does not exist"
    numbers = [int(number) for number in re.findall(r"\d+", line or (anchor if re.match(r"L\d+", anchor) else ""))]
    if numbers:
        lines = file.read_text(encoding="utf-8").splitlines()
        symbol = symbol_of(text)
        if symbol and not re.search(rf"\b{symbol[1]}\b", "".join(lines[numbers[0] - 1:numbers[0]])):
            place = place_of(symbol, lines, numbers[0])
            found = f"which is in line {place} now (./dev docs --fix)" if place else "which is nowhere in that file"
            return f"does not have `{symbol[1]}`, {found}"
        if max(numbers) > len(lines):
            return "has fewer lines"
    if anchor and not numbers and file.suffix == ".md" and anchor not in anchors(file):
        return "has no such heading"
    return None


def fix(page: Path) -> None:
    """Writes into a page's links to symbols the lines where these are now."""

    def moved(link: re.Match) -> str:
        text, path, line = link.groups()
        symbol, file = symbol_of(text), page.parent / path
        if not symbol or not file.is_file():
            return link[0]
        place = place_of(symbol, file.read_text(encoding="utf-8").splitlines(), int(line)) or int(line)
        if place != int(line):
            print(f"{page.relative_to(ROOT)}: {text} of {path}: line {line} -> {place}")
        return f"[{text}]({path}#L{place})"

    before = page.read_text(encoding="utf-8")
    after = SYMBOL_LINK.sub(moved, before)
    if after != before:
        page.write_text(after, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="let links to symbols follow them to their lines")
    options = parser.parse_args()
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    targets = 0
    faults = []
    for page in pages:
        if options.fix:
            fix(page)
        faults += [f"{page.relative_to(ROOT)}: its contents leave out '{section}'" for section in left_out(page)]
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            named = [(text, target, page.parent) for text, target in LINK.findall(line) if not re.match(r"[a-z]+:", target)]
            named += [("", target, ROOT) for target in CODE.findall(line)]
            targets += len(named)
            for text, target, base in named:
                if why := fault(page, text, target, base):
                    faults.append(f"{page.relative_to(ROOT)}:{number}: {target} {why}")
    print(*faults, f"{len(pages)} pages, {targets} references, {len(faults)} at fault", sep="\n")
    return 1 if faults or not targets else 0


if __name__ == "__main__":
    sys.exit(main())
