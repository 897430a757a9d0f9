"""Fail on private vocabulary, British spelling, and docstrings that do not begin like a sentence.

    python tools/dev/check_words.py [FILE ...]

Without files: every tracked text file. Prints `file:line: word: use ...` for each finding; exit code 1 if there is one.
Texts of the operating system that tests quote are listed in `QUOTED`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIXES = (".py", ".md", ".sh", ".sbatch", ".yaml", ".yml", ".toml", ".txt")
SKIPPED = (
    "constraints/",
    "configs/models/",
    "tests/golden/",
    "docs/reference/",
    "tools/dev/check_words.py",
    "tests/unit/tools/test_check_words.py",  # contains the words on purpose
    "LICENSE",
)

# Pattern of a whole word (ignoring case) -> what to write instead.
PRIVATE_WORDS = {
    r"doors?|doorstep": "server, listener, or client",
    r"parcels?": "transfer group",
    r"attendance": "straggler barrier",
    r"neighbours?": "peer memory, or neighbors",
    r"stand[-_]ins?|standins?": "stub, fake, or recording tensor",
    r"in vain": "timed out",
    r"taught|teach(?:es|ing)?": "pre-trained, pre-training",
    r"proven|unproven|disproven": "verified, not verified",
    r"lends?|lent|lending": "send in place, zero-copy",
    r"hears?|heard": "receives",
    r"speaks?(?: for)?|spoke|spoken": "uses, broadcasts, or is written in",
    r"greets?|greeted|greeting": "handshake",
    r"jails?": "sandbox child",
    r"quirks?": "patch, defect",
    r"refuses?|refused|refusing|refusal": "rejects, is not supported",
    r"nobody": "no rank, no process",
    r"goes on|go on|went on": "continues, is still running",
    r"has ended|have ended|had ended": "exited, finished",
    r"stands? still|stood still": "is not responding",
    r"riddles?": "unclear",
}
BRITISH = {
    r"(?:un|re|de)?quantis\w+": "quantize",
    r"behaviours?|behavioural": "behavior",
    r"(?:re|un)?initialis\w+": "initialize",
    r"optimis(?!ti)\w+": "optimize",
    r"normalis\w+": "normalize",
    r"(?:de)?tokenis\w+": "tokenize",
    r"(?:de)?serialis\w+": "serialize",
    r"organis\w+|recognis\w+|synchronis\w+|utilis\w+|summaris\w+|parallelis(?:e|es|ed|ing|ation)": "-ize",
    r"colours?|favours?|neighbouring|centres?|labell(?:ed|ing)|modell(?:ed|ing)": "American spelling",
}
QUOTED = ("Connection refused",)  # texts of the operating system
_WORDS = {**PRIVATE_WORDS, **BRITISH}
_PATTERN = re.compile(
    "|".join(rf"(?P<w{i}>(?<![A-Za-z])(?:{p})(?![A-Za-z]))" for i, p in enumerate(_WORDS)), re.IGNORECASE
)
_DOCSTRING = re.compile(r"(Of|As|What|Those|Whether|Who|How)\b")


def private_words(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line number, word and remedy of each private word of a text."""
    for quoted in QUOTED:
        text = text.replace(quoted, "")
    for number, line in enumerate(text.splitlines(), 1):
        for found in _PATTERN.finditer(line):
            yield number, found[0], f"use {list(_WORDS.values())[int(str(found.lastgroup)[1:])]}"


def docstring_starts(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line number, first word and remedy of each docstring that begins with a fragment."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            start = _DOCSTRING.match(ast.get_docstring(node) or "")
            if start:
                line = getattr(node, "lineno", 1)
                yield line, start[0], "begin with a verb (a function) or a noun (a class)"


def findings(path: Path) -> list[str]:
    """Return one line per finding in a file."""
    text = path.read_text(encoding="utf-8")
    found = list(private_words(text))
    if path.suffix == ".py":
        found += docstring_starts(text)
    return [f"{path}:{line}: {word!r}: {remedy}" for line, word, remedy in sorted(found)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    names = list(sys.argv[1:] if argv is None else argv)
    if not names:
        names = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    paths = [Path(n) for n in names if n.endswith(SUFFIXES) and not n.startswith(SKIPPED) and Path(n).is_file()]
    found = [line for path in paths for line in findings(path)]
    print("\n".join(found[:200] + ([f"... and {len(found) - 200} more"] if len(found) > 200 else [])), end="")
    if found:
        print(f"\n{len(found)} finding(s) in {len({line.split(':')[0] for line in found})} file(s)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
