"""Who includes whom is what docs/architecture.md says: its table, read here, and every `#include` of a file of this repository.

    python3 tests/includes_test.py
"""

import fnmatch
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (".h", ".cpp", ".cuh")
PLACE = re.compile(r"((?:src|include|python|examples)/[\w/.]+)(?: \(([^)]*)\))?")


def table(text: str) -> dict[str, list[str]]:
    """Of each room the patterns of what it may include; a row that begins with "and" adds to the room around it."""
    rows: dict[str, str] = {}
    for left, arrow, right in re.findall(r"^    (\S+)? +(→)? +(.*)$", text, re.MULTILINE):
        if arrow:
            rows[left] = right
        elif not left and rows:
            rows[list(rows)[-1]] += " " + right
    rooms = {}
    for room, right in rows.items():
        places = PLACE.findall(right)
        rooms[room] = [f"{place}/{name.strip()}*" for place, names in places for name in names.split(",") if re.fullmatch(r" ?[\w/.*]+", name)]
        rooms[room] += [f"{place}*" for place, names in places if not re.search(r"[\w*]\.h|jit", names)]
    for room, right in rows.items():
        if right.startswith("and "):
            rooms[room] += rooms[str(Path(room).parent)]
    return rooms


def main() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = table(page.split("\n## Who may include whom\n")[1].split("\n## ")[0])

    def room_of(path: str) -> str:
        return max((room for room in rooms if path.startswith(room + "/")), key=len, default="")

    faults, seen = [], 0
    for room in rooms:
        for file in sorted((ROOT / room).rglob("*")):
            name = file.relative_to(ROOT).as_posix()
            if file.suffix not in SOURCES or room_of(name) != room:
                continue
            for included in re.findall(r'^#include ["<](.+)[">]', file.read_text(encoding="utf-8"), re.MULTILINE):
                target = next((f"{base}/{included}" for base in ("src", "include") if (ROOT / base / included).is_file()), None)
                if target is None:
                    continue  # the system's, a dependency's, or a neighbour's
                seen += 1
                if room_of(target) != room and not any(fnmatch.fnmatch(target, pattern) for pattern in rooms[room]):
                    faults.append(f"{name} includes {target}, which docs/architecture.md does not allow {room}")
    print("\n".join(faults) or f"{seen} includes of {len(rooms)} rooms, all allowed")
    sys.exit(bool(faults) or seen == 0)


if __name__ == "__main__":
    main()
