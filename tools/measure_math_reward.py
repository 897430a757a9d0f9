r"""Measure the reward `math`: wrong decisions on labeled pairs and on mutations of real answers, and its speed.

    python tools/measure_math_reward.py --answers college_math_300.jsonl --gsm8k test.jsonl --labels math.jsonl
    python tools/measure_math_reward.py --measure speed --answers college_math_300.jsonl --other-tree ../old

labels: rows of {completion, answer, right}. rewritings: each answer in equal notations, which must score 1. mutations:
each answer with a dropped point, a moved fraction bar, a dropped bracket, swapped digits, a changed digit, a changed
sign, a dropped factorial or root, or an added hedge, which must score 0. speed: answers per second of CPU time and the
99th percentile; with `--other-tree`, the package in another folder is measured in alternation with this one.

A false positive is a wrong answer that scores 1. Exit code 1: a rate exceeds its target. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.rewards.builtin.math import math
from grpo_mega.types import UserError

MEASURES = ("labels", "rewritings", "mutations", "speed")
MAX_FALSE_POSITIVES = 0.001
MIN_ANSWERS_PER_SECOND = 300
MAX_P99_SECONDS = 0.05
ROUNDS = 5

_FRACTION = re.compile(r"\\frac\{([^{}]+)\}\{([^{}]+)\}")
_TWO_DIGITS = re.compile(r"(\d)(\d)")
_HEDGES = ("{0} or {1}", "{0}, {1}", r"{0} \text{{ or }} {1}", "{1} or {0}", "{0}; {1}", r"{0} \text{{ maybe }} {1}")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}", remedy="give a JSONL file") from error


def without_dollars(answer: str) -> str:
    """Return an answer without dollar signs that enclose everything."""
    bare = answer.strip()
    return bare[1:-1] if bare.startswith("$") and bare.endswith("$") and bare.count("$") == 2 else bare


def boxed(answer: str) -> str:
    """Return the answer in the box of a short solution."""
    return f"We compute step by step.\n\nTherefore the answer is $\\boxed{{{answer}}}$."


def real_answers(args: argparse.Namespace) -> list[str]:
    """Return the answers of all files, without dollar signs and without sentences."""
    answers = [without_dollars(row["answer"]) for row in rows_of(args.answers)] if args.answers else []
    if args.gsm8k:
        answers += [row["answer"].rpartition("####")[2].strip() for row in rows_of(args.gsm8k)]
    if args.labels:
        answers += [without_dollars(row["answer"]) for row in rows_of(args.labels)]
    if not answers:
        raise UserError("no file of answers was named", remedy="give --answers, --gsm8k or --labels")
    return [answer for answer in answers if not re.search(r"(?<!\\)\b[A-Za-z]{4,}\s+[A-Za-z]{2,}\b", answer)]


def rewritings(answer: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, equal answer in another notation)."""
    yield "same", answer
    yield "dfrac", answer.replace(r"\frac", r"\dfrac")
    if "\\begin" not in answer:
        yield "spaces", f"  {answer.replace('{', '{ ').replace('+', ' + ')} "
    yield "dollars", f"${answer}$"
    if re.fullmatch(r"-?[0-9]+", answer):
        yield "decimal", answer + ".0"
        yield "fraction", f"\\frac{{{int(answer) * 3}}}{{3}}"
    fraction = re.fullmatch(r"(-?)\\frac\{([0-9]+)\}\{([0-9]+)\}", answer)
    if fraction is not None:
        yield "slash", f"{fraction[1]}{fraction[2]}/{fraction[3]}"
        yield "expanded", f"{fraction[1]}\\frac{{{int(fraction[2]) * 7}}}{{{int(fraction[3]) * 7}}}"


def _removed(answer: str, pattern: str) -> list[str]:
    return [answer[: m.start()] + answer[m.end() :] for m in re.finditer(pattern, answer)]


def mutations(answer: str, others: list[str], source: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (kind, wrong answer that resembles the right one)."""
    for text in _removed(answer, r"(?<=\d)\.(?=\d)"):
        yield "dropped point", text
    for match in re.finditer(r"(?<=[1-9])(?=[1-9])", answer):
        yield "added point", answer[: match.start()] + "." + answer[match.start() :]
    for match in _FRACTION.finditer(answer):
        if match[1].strip() != match[2].strip():
            moved = f"\\frac{{{match[2]}}}{{{match[1]}}}"
            yield "moved bar", answer[: match.start()] + moved + answer[match.end() :]
        if match[1].isdigit() and len(match[1]) > 1:
            moved = f"\\frac{{{match[1][:-1]}}}{{{match[1][-1]}{match[2]}}}"
            yield "moved bar", answer[: match.start()] + moved + answer[match.end() :]
    for text in _removed(answer, r"\\left[(\[]|\\right[)\]]|\\?[{}]|[()\[\]]"):
        yield "dropped bracket", text
    for match in _TWO_DIGITS.finditer(answer):
        if match[1] != match[2]:
            yield "swapped digits", answer[: match.start()] + match[2] + match[1] + answer[match.end() :]
    for match in re.finditer(r"\d", answer):
        digit = str((int(match.group()) + source.randrange(1, 10)) % 10)
        yield "changed digit", answer[: match.start()] + digit + answer[match.end() :]
    for match in re.finditer(r"[-+]", answer):
        sign = "+" if match.group() == "-" else "-"
        yield "changed sign", answer[: match.start()] + sign + answer[match.end() :]
    for text in _removed(answer, r"!|\\sqrt(?=\{)|\\pm"):
        yield "dropped operator", text
    for hedge in source.sample(_HEDGES, 3):
        yield "added hedge", hedge.format(answer, source.choice(others))
    others = [other for other in others if math("", boxed(other), answer) == 0.0]  # `5` repeats `5 cm`
    if others:
        yield "two boxes", f"{answer}}}$ or $\\boxed{{{source.choice(others)}"


def is_same_number(first: str, second: str) -> bool:
    """Return True when both texts are the same plain number or simple fraction, so that a mutation changed nothing."""
    values = []
    for text in (first, second):
        plain = _FRACTION.sub(r"\1/\2", text.replace(",", "").replace(" ", ""))
        try:
            values.append(Fraction(plain))
        except (ValueError, ZeroDivisionError):
            return first == second
    return values[0] == values[1]


def measure_labels(args: argparse.Namespace) -> dict[str, Any]:
    """Measure wrong decisions on labeled pairs."""
    if args.labels is None:
        raise UserError("--measure labels needs --labels", remedy="give a file of {completion, answer, right}")
    pairs = [("label", r["completion"], r["answer"], bool(r["right"])) for r in rows_of(args.labels)]
    return _rates(pairs, args.show)


def measure_rewritings(args: argparse.Namespace) -> dict[str, Any]:
    """Measure equal answers that score 0."""
    pairs = [(kind, boxed(text), answer, True) for answer in real_answers(args) for kind, text in rewritings(answer)]
    return _rates(pairs, args.show)


def measure_mutations(args: argparse.Namespace) -> dict[str, Any]:
    """Measure wrong answers that score 1."""
    source = random.Random(args.seed)
    answers = real_answers(args)
    pairs = []
    for answer in answers:
        others = [other for other in source.sample(answers, 8) if not is_same_number(other, answer)]
        for kind, text in mutations(answer, others, source):
            is_determinant = kind == "changed digit" and r"\left|\begin" in answer  # another one may have this value
            if not is_same_number(text, answer) and "^{0}" not in answer and not is_determinant:  # x^{0} is always 1
                pairs.append((kind, boxed(text), answer, False))
    return _rates(pairs, args.show)


def _rates(pairs: list[tuple[str, str, str, bool]], show: int) -> dict[str, Any]:
    counts = {"false_positives": 0, "false_negatives": 0}
    kinds: dict[str, list[int]] = {}
    wrong = []
    for kind, completion, reference, right in pairs:
        is_accepted = math("", completion, reference) == 1.0
        kinds.setdefault(kind, [0, 0])[0] += 1
        if is_accepted != right:
            counts["false_positives" if is_accepted else "false_negatives"] += 1
            kinds[kind][1] += 1
            wrong.append({"kind": kind, "completion": completion[-120:], "reference": reference[-120:]})
    num_wrong_answers = sum(not right for *_, right in pairs)
    rate = counts["false_positives"] / max(num_wrong_answers, 1)
    return {
        "pairs": len(pairs),
        **counts,
        "false_positive_rate": rate,
        "false_negative_rate": counts["false_negatives"] / max(len(pairs) - num_wrong_answers, 1),
        "met": rate <= MAX_FALSE_POSITIVES,
        "kinds": {kind: {"pairs": total, "wrong_decisions": failed} for kind, (total, failed) in kinds.items()},
        "examples": wrong[:show],
    }


def time_answers(path: Path) -> dict[str, float]:
    """Return answers per second of CPU time and the 99th percentile: each answer against itself and the next one."""
    answers = [row["answer"] for row in rows_of(path)]
    seconds = []
    for index, answer in enumerate(answers):
        for other in (answer, answers[(index + 1) % len(answers)]):
            started = time.process_time()
            math("", boxed(without_dollars(other)), answer)
            seconds.append(time.process_time() - started)
    return {"per_second": len(seconds) / sum(seconds), "p99": sorted(seconds)[int(0.99 * len(seconds))]}


def measure_speed(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the speed of this package, and of another one in alternation, each in new processes."""
    if args.answers is None:
        raise UserError("--measure speed needs --answers", remedy="give a file of answers")
    trees = [Path(__file__).resolve().parents[1], *([args.other_tree] if args.other_tree else [])]
    found: list[list[dict[str, float]]] = [[] for _ in trees]
    for _ in range(ROUNDS):
        for tree, results in zip(trees, found, strict=True):
            command = [sys.executable, __file__, "--time-once", "--answers", str(args.answers)]
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout))
    middle: Callable[[list[float]], float] = lambda values: sorted(values)[len(values) // 2]  # noqa: E731
    rates = [middle([result["per_second"] for result in results]) for results in found]
    p99 = [middle([result["p99"] for result in results]) for results in found]
    return {
        "per_second": rates[0],
        "p99_seconds": p99[0],
        "other_per_second": rates[1] if args.other_tree else None,
        "other_p99_seconds": p99[1] if args.other_tree else None,
        "met": rates[0] >= MIN_ANSWERS_PER_SECOND and p99[0] <= MAX_P99_SECONDS,
    }


@errors_as_exit_codes()
def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=MEASURES, action="append", help="default: all")
    parser.add_argument("--answers", type=Path, help="JSONL with answers in LaTeX")
    parser.add_argument("--gsm8k", type=Path, help="a GSM8K file, for more answers to mutate")
    parser.add_argument("--labels", type=Path, help="JSONL of {completion, answer, right}")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: %(default)s)")
    parser.add_argument("--show", type=int, default=10, help="wrong decisions to print (default: %(default)s)")
    parser.add_argument("--other-tree", type=Path, help="speed: folder of another version of this repository")
    parser.add_argument("--time-once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    measures = {
        "labels": measure_labels,
        "rewritings": measure_rewritings,
        "mutations": measure_mutations,
        "speed": measure_speed,
    }
    if args.time_once:
        print(json.dumps(time_answers(args.answers)))
        return 0
    results = {name: measures[name](args) for name in args.measure or MEASURES}
    for name, result in results.items():
        for example in result.pop("examples", []):
            print(f"{name}: {example}")
    print(json.dumps({"name": "math_reward", "seed": args.seed, "results": results}))
    return 0 if all(result["met"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
