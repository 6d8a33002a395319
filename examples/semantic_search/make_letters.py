#!/usr/bin/env python3
"""Writes letters.h: what WordPiece's uncased normalisation makes of letters, and what counts as punctuation, of Unicode.

    python3 make_letters.py >letters.h

Standard library only.  Covers the alphabets below U+0600 and the Latin and Greek supplements at U+1E00.
"""

import unicodedata

LETTERS = [*range(0x41, 0x5B), *range(0xC0, 0x600), *range(0x1E00, 0x2000)]


def plain(c):
    return "".join(x for x in unicodedata.normalize("NFD", c.lower()) if unicodedata.category(x) != "Mn")


def lines(items, width=118):
    line = ""
    for item in items:
        if len(line) + len(item) + 2 > width:
            yield line
            line = ""
        line += (" " if line else "  ") + item + ","
    yield line


folded = [(c, ord(p)) for c in LETTERS if unicodedata.category(chr(c))[0] == "L" and len(p := plain(chr(c))) == 1 and ord(p) != c]
marks = [c for c in range(0x300, 0x10000) if unicodedata.category(chr(c)) == "Mn"]
punctuation = [c for c in range(0x80, 0x10000) if unicodedata.category(chr(c)).startswith("P")]


def ranges(points):
    runs = []
    for c in points:
        if runs and runs[-1][1] == c - 1:
            runs[-1][1] = c
        else:
            runs.append([c, c])
    return [f"{{0x{a:x}, 0x{b:x}}}" for a, b in runs]


print("#pragma once\n\n// Made by make_letters.py from Unicode", unicodedata.unidata_version + ".\n")
print("namespace letters {\n")
print("struct Pair {\n  char32_t first, second;\n};\n")
for name, comment, items in (
    ("kPlain", "Letters, and what is left of them in lower case without accents.", [f"{{0x{a:x}, 0x{b:x}}}" for a, b in folded]),
    ("kMarks", "Ranges of combining marks, which go.", ranges(marks)),
    ("kPunctuation", "Ranges of punctuation beyond ASCII's, which stands alone.", ranges(punctuation)),
):
    print(f"/// {comment}\ninline constexpr Pair {name}[] = {{")
    print("\n".join(lines(items)))
    print("};\n")
print("}  // namespace letters")
