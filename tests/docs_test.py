"""What the documents point at exists: linked files, headings and lines, and paths of this repository named in code style."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("include", "src", "tools", "tests", "bench", "docs", "examples", "cmake", "python", ".ci")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`((?:%s)/[^`\s]*)`" % "|".join(re.escape(folder) for folder in FOLDERS))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule: lower case, words joined by hyphens, punctuation dropped."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def fault(page: Path, target: str, base: Path) -> str | None:
    """Why `target`, named on `page`, leads nowhere; None where it leads somewhere."""
    path, _, anchor = target.partition("#")
    path, _, line = path.partition(":")
    file = base / path if path else page
    if "*" in path:
        return None if any(base.glob(path)) else "matches no file"
    if not file.exists():
        return "does not exist"
    lines = [int(number) for number in re.findall(r"\d+", line or (anchor if re.match(r"L\d+", anchor) else ""))]
    if lines and max(lines) > len(file.read_text(encoding="utf-8").splitlines()):
        return "has fewer lines"
    if anchor and not lines and file.suffix == ".md" and anchor not in anchors(file):
        return "has no such heading"
    return None


def main() -> int:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    targets = 0
    faults = []
    for page in pages:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            named = [(target, page.parent) for target in LINK.findall(line) if not re.match(r"[a-z]+:", target)]
            named += [(target, ROOT) for target in CODE.findall(line)]
            targets += len(named)
            for target, base in named:
                if why := fault(page, target, base):
                    faults.append(f"{page.relative_to(ROOT)}:{number}: {target} {why}")
    print(*faults, f"{len(pages)} pages, {targets} references, {len(faults)} lead nowhere", sep="\n")
    return 1 if faults or not targets else 0


if __name__ == "__main__":
    sys.exit(main())
