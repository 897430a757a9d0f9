"""Worked examples for the pre-training of a tiny base model: the text of a prompt and the text of its completion.

A fraction of the examples is flawed on purpose, chosen anew at every draw: an arithmetic answer with a mistake, or a
GSM8K answer without its format. So the base model produces both kinds, and GRPO can learn the difference. All
randomness comes from the given generator.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

from grpo_mega.data import arithmetic
from grpo_mega.types import UserError

Example = tuple[str, str]
Draw = Callable[[random.Random], Example]

_MAX_CALCULATION_CHARS = 32
_CALCULATION = re.compile(r"<<([^<>]*)>>")


def arithmetic_examples(flawed_fraction: float, tool_fraction: float = 0.0) -> Draw:
    """Return a function that draws examples of the arithmetic task from its pre-training pairs.

    An example is `("7+58=", "65")`, or with probability `flawed_fraction` a wrong answer. With probability
    `tool_fraction` it is the call of the calculator and its result, `"<<7+58>>65"`.
    """
    pairs = arithmetic.pairs("pretrain")

    def draw(rng: random.Random) -> Example:
        pair = rng.choice(pairs)
        correct = arithmetic.answer(pair)
        if tool_fraction and rng.random() < tool_fraction:
            return arithmetic.question(pair), f"<<{arithmetic.question(pair).removesuffix('=')}>>{correct}"
        flawed = rng.random() < flawed_fraction
        return arithmetic.question(pair), with_mistake(correct, rng) if flawed else correct

    return draw


def with_mistake(number: str, rng: random.Random) -> str:
    """Return `number` with a wrong digit, a missing digit or a blank between digits; one digit is always replaced.

    The result never has the value of `number`, also after stripping the blanks at its ends.
    """
    kind = rng.choice(("digit", "missing", "blank")) if len(number) > 1 else "digit"
    if kind == "blank":
        at = rng.randrange(1, len(number))
        return f"{number[:at]} {number[at:]}"
    at = rng.randrange(len(number))
    if kind == "missing":
        return number[:at] + number[at + 1 :]
    wrong = rng.choice([digit for digit in "0123456789" if digit != number[at]])
    return number[:at] + wrong + number[at + 1 :]


def gsm8k_examples(path: Path, flawed_fraction: float, max_bytes: int, tool_fraction: float = 0.0) -> Draw:
    r"""Return a function that draws examples from the first half of a GSM8K file.

    The prompt is the question. The completion is the last calculation of the solution with the result,
    "`\n48+24=72\n#### 72`", or with probability `flawed_fraction` the same without its format, "`\n48+24=72\n72`". With
    probability `tool_fraction` it calls the calculator, "`\n<<48+24>>72\n#### 72`". Examples of more than `max_bytes`
    bytes of UTF-8 are not used.

    Raises:
        UserError: the file is missing, a line is not `{"question", "answer"}` with a `####` line, or no example is
            short enough.
    """
    solved = _read_gsm8k(path)
    solved = solved[: max(1, len(solved) // 2)]
    kept = [row for row in solved if len("".join(row).encode()) + len("\n\n#### ") <= max_bytes]
    if not kept:
        raise UserError(
            f"model.base.examples={path} has no example of at most {max_bytes} bytes",
            remedy="raise model.base.architecture.max_positions",
        )

    def draw(rng: random.Random) -> Example:
        question, calculation, result = rng.choice(kept)
        mark = "" if rng.random() < flawed_fraction else "#### "
        expression, equals, value = calculation.rpartition("=")
        if tool_fraction and equals and rng.random() < tool_fraction:
            calculation = f"<<{expression}>>{value}"
        return question, f"\n{calculation}\n{mark}{result}"

    return draw


def _read_gsm8k(path: Path) -> list[tuple[str, str, str]]:
    """Return (question, last calculation, result) of every line."""
    if not path.is_file():
        raise UserError(
            f"model.base.examples={path}: no such file",
            remedy="put GSM8K's train.jsonl there (grade_school_math/data/train.jsonl of openai/grade-school-math)",
        )
    rows: list[tuple[str, str, str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        try:
            record = json.loads(line)
            question, solution = str(record["question"]), str(record["answer"])
            steps, result = solution.rsplit("####", 1)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: not a GSM8K example ({error})",
                remedy='write lines of the form {"question": ..., "answer": "... #### 72"}',
            ) from error
        calculations = _CALCULATION.findall(steps)
        last = calculations[-1] if calculations else steps.strip().splitlines()[-1] if steps.strip() else result
        rows.append((question, last.strip()[:_MAX_CALCULATION_CHARS], result.strip()))
    if not rows:
        raise UserError(f"model.base.examples={path} is empty", remedy="put GSM8K's train.jsonl there")
    return rows
