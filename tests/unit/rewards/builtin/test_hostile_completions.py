"""Time and memory of `gsm8k` and `math` on completions of 1 MB, thousands of boxes, and expensive formulas.

Each completion may use 2 s of CPU time, and the process 300 MB.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest

MAX_SECONDS = 2.0
MAX_BYTES = 300 * 10**6

# What a search for a bracket, a pair of marks, a sentence or a number might read again and again.
PIECES = (
    *("{", "}", "(", "[", "$", "$$", "\\[", "\\(", "\\{", "^", "1", "9,", "1,234 ", "7 ", "x^", "\\frac", "\\sqrt{"),
    *("\\text{", "<", "<<", "<!--", "<s>", "<del>", "~~", "~", "!", "...", "\u2026", "\u0663", "\u00bd", "\uff17"),
    *("\u4e07", "\U0001f600", "or ", "one ", "the answer is ", "The answer is \\[", "The answer is $", "Answer: 5 "),
    *("wait, ", "#### ", "#### 5\n", "\\boxed{", "\\boxed{5} ", "\\boxed5 ", "```\n", "~~~", "<think>", "</think>"),
    *("x = 3, x = \\boxed{5} ", "$\\begin{cases}\\boxed{5} ", "answer **", "; 5 also", "; 5 for", "\n!"),
    *("7 and \\boxed{5}", "<answer>", "\n", " ", "\\", "&", "%", "1/", "-", "+", "*", "=", "5 or ", "1\u0336"),
)
WORST = (
    "<!--",
    "<s>",
    "~~",
    "The answer is \\[",
    "#### 5\n",
    "\\boxed{5} ",
    "\\boxed{",
    "1,234 ",
    "<think>",
    "\u0663",
    "```\n",
    "\n",
    "$",
    "\n",
)
FORMULAS = (
    *("9^{9^{9}}", "1E1000000", "((3000!)!)!", r"\binom{20000}{10000}", "+".join([r"\sqrt{2}"] * 140), "9" * 1990),
    *("+".join(rf"\sin({k}x)" for k in range(90)), ",".join(rf"\sqrt{{{k}}}" for k in range(100)), r"\pm 1" * 4),
    *("*".join([r"\sqrt{19999!}"] * 40), r"\cup".join(f"({k},{k + 2})" for k in range(60)), "{" * 900 + "}" * 900),
    *("9" * 900 + "^{" + "9" * 900 + "}", r"0.\overline{" + "9" * 1900 + "}", "(x+y+z+w)^{400}", "1000000!"),
)
PROGRAM = """
import json, sys, time
from grpo_mega.rewards.builtin.gsm8k import gsm8k
from grpo_mega.rewards.builtin.math import math

slowest = (0.0, "")
for line in sys.stdin:
    completion, reference = json.loads(line)
    for reward in (gsm8k, math) if reference.isdigit() else (math,):
        started = time.process_time()
        try:
            reward("", completion, reference)
        except TimeoutError:
            pass
        slowest = max(slowest, (time.process_time() - started, f"{reward.__name__}: {completion[:60]!r}"))
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([*slowest, peak]))
"""


def hostile_completions(pieces: tuple[str, ...], size: int) -> Iterator[tuple[str, str]]:
    """Yield (completion, reference): long texts of one piece, alone, behind a box and in a box, and formulas."""
    for piece in pieces:
        long = piece * (size // len(piece))
        yield from ((start + long + end, "5") for start, end in (("", ""), ("\\boxed{5} ", ""), ("\\boxed{", "}")))
    for formula in FORMULAS:
        yield from ((f"\\boxed{{{formula}}}", reference) for reference in ("x+1", r"\sqrt{2}"))
    yield " ".join(rf"\boxed{{\sqrt{{{k}}}}}" for k in range(99)), r"\sqrt{2}"
    yield " ".join(rf"\boxed{{{k}}}" for k in range(size // 12)), "5"
    generator = random.Random(0)
    yield "".join(generator.choice(pieces) for _ in range(size // 8)), "5"


def slowest_and_peak(rows: list[tuple[str, str]]) -> tuple[float, str, int]:
    """Return the CPU time of the slowest scoring, its reward and completion, and the peak memory of the process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="\n".join(map(json.dumps, rows)),
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, name, peak = json.loads(done.stdout)
    return seconds, name, peak


def test_the_worst_kinds_of_hostile_completions_stay_below_two_seconds_and_300_megabytes() -> None:
    seconds, name, peak = slowest_and_peak(list(hostile_completions(WORST, 50_000)))
    assert seconds < MAX_SECONDS / 10, name  # of a twentieth of the size
    assert peak < MAX_BYTES


@pytest.mark.long
def test_hostile_completions_of_a_megabyte_stay_below_two_seconds_and_300_megabytes() -> None:
    rows = list(hostile_completions(PIECES, 1_000_000))
    assert len(rows) > 200
    seconds, name, peak = slowest_and_peak(rows)
    assert seconds < MAX_SECONDS, name
    assert peak < MAX_BYTES
