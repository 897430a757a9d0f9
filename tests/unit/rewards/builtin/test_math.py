"""`math` compared with hand-written labels and the answers of a mathematics course."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import build_rewards
from grpo_mega.rewards.builtin.math import is_prose, math
from grpo_mega.rewards.pool import RewardPool
from grpo_mega.types import UserError

# (completion, reference): what a careful reader would mark as right. One row per form of an answer or of an ending.
RIGHT = [
    (r"so $\boxed{\frac{1}{2}}$.", r"$\frac{1}{2}$"),
    (r"\boxed{0.5}", r"$\frac{1}{2}$"),
    (r"\boxed{1/2}", r"\dfrac12"),
    (r"\boxed{2\sqrt2}", r"$\sqrt{8}$"),
    (r"\boxed{\text{no solution}}", "No solution"),
    (r"We find: \boxed{[1, 2)}", "$[1,2)$"),
    (r"\boxed{[2,\infty)\cup(-\infty,-9]}", r"$n \leqslant-9$ or $n \geqslant 2:(-\infty,-9] \cup[2, \infty)$"),
    (r"\boxed{\{2, 1\}}", r"$\{1,2\}$"),
    (r"\boxed{x \in [-6,-2]}", "$[-6,-2]$"),
    (r"\boxed{100}", r"$100 \mathrm{~N}$"),
    (r"\boxed{45\text{ mph}}", r"$45 \mathrm{mph}$"),
    (r"\boxed{50\%}", "$0.5$"),
    (r"\boxed{50}", r"$50 \%$"),
    (r"\boxed{\pm 3}", "$3,-3$"),
    (r"\boxed{x=4}", "4"),
    (r"\boxed{(x+4)(x-4)}", "$x^{2}-16$"),
    (r"\boxed{9x^2 - 20x = -4}", "$9 x^{2}-20 x+4=0$"),
    (r"\boxed{5.25}", r"$5 \frac{1}{4} \mathrm{~min}$"),
    (r"\boxed{7474}", r"$7.474 \times 10^{3}$"),
    (r"\boxed{\begin{pmatrix}0&1\\0&0\end{pmatrix}}", r"$\left[\begin{array}{ll}0 & 1 \\ 0 & 0\end{array}\right]$"),
    (r"first \boxed{3}, then \boxed{4}", "4"),
    ("Therefore, the final answer is $-2$. I hope it is correct.", "-2"),
    ("The answer is 12.", "12"),
    (r"\boxed{4}", r"2 + 2 makes \boxed{4}"),
    (r"\boxed{\text{Yes}}", "Yes"),
    ("Yes. It has a unique solution.", "Yes. It has a unique solution."),
    (r"\boxed{2^{2024}}", "$4^{1012}$"),
]

WRONG = [
    (r"\boxed{\frac{1}{3}}", r"$\frac{1}{2}$"),
    (r"\boxed{0.33}", r"$\frac{1}{3}$"),
    (r"\boxed{[1,2]}", "$[1,2)$"),
    (r"\boxed{(2,1)}", "$(1,2)$"),
    (r"\boxed{\{1,2,3\}}", r"$\{1,2\}$"),
    (r"\boxed{5\%}", "$50$"),
    (r"\boxed{-i}", "$i$"),
    (r"\boxed{\text{no}}", "Yes"),
    ("It is a casino", "No"),
    ("It has a unique solution.", "Yes. It has a unique solution."),
    (r"\boxed{-1}", "No. Consider $x+y+z=2$ and $x+y+z=-1$."),
    (r"\boxed{}", "4"),
    ("", "4"),
    (r"\boxed{4", "5"),
    (r"\boxed{3}, no: \boxed{4}", "3"),
    (r"\boxed{x^2-15}", "$x^{2}-16$"),
]


@pytest.fixture(scope="module")
def answers(math_dir: Path) -> list[str]:
    with (math_dir / "college_math_300.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["answer"] for line in lines]


def boxed(answer: str) -> str:
    """Return the answer in a sentence with a box, without dollar signs that enclose everything."""
    bare = answer.strip()
    if bare.startswith("$") and bare.endswith("$") and bare.count("$") == 2:
        bare = bare.strip("$")
    return f"We compute step by step.\n\nTherefore the answer is $\\boxed{{{bare}}}$."


def rewritings(answer: str) -> Iterator[str]:
    """Return equal answers with other layout, fraction commands, spaces and sizes."""
    yield boxed(answer)
    yield boxed(answer.replace(r"\frac", r"\dfrac"))
    yield boxed(answer.replace(r"\frac", r"\tfrac").replace(r"\left[", "[").replace(r"\right]", "]"))
    yield boxed(re.sub(r"(?<![a-zA-Z}]) (?=[+\-=])|(?<=[+\-=,]) (?![a-zA-Z])", "", answer))
    yield boxed(f"  {answer.strip()} ")


@pytest.mark.parametrize(("completion", "reference"), RIGHT)
def test_a_right_answer_scores_one(completion: str, reference: str) -> None:
    assert math("", completion, reference) == 1.0


@pytest.mark.parametrize(("completion", "reference"), WRONG)
def test_a_wrong_answer_scores_zero(completion: str, reference: str) -> None:
    assert math("", completion, reference) == 0.0


def mistaken_for_different(answers: Sequence[str]) -> list[tuple[str, str]]:
    return [(a, form) for a in answers for form in (a, *rewritings(a)) if math("", form, a) != 1.0]


def mistaken_for_equal(answers: Sequence[str], all_answers: list[str]) -> list[tuple[str, str]]:
    following = dict(itertools.pairwise([*all_answers, all_answers[0]]))
    return [(a, following[a]) for a in answers if a != following[a] and math("", boxed(following[a]), a) != 0.0]


def test_one_in_ten_course_answers_equals_its_rewritings_and_differs_from_the_next_one(answers: list[str]) -> None:
    assert len(answers) == 300
    assert mistaken_for_different(answers[::10]) == []
    assert mistaken_for_equal(answers[::10], answers) == []


@pytest.mark.long
def test_each_course_answer_equals_its_rewritings_and_differs_from_the_next_one(answers: list[str]) -> None:
    assert mistaken_for_different(answers) == []
    assert mistaken_for_equal(answers, answers) == []


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9}}",
        "9^9^9",
        "9**9**9",
        "{9}^{{9}^{9}}",
        "99999999!",
        "9!!!!!",
        "2^{10000000}",
        "9" * 5000,
        "(" * 3000,
        "[" * 900,
        r"\frac{" * 400,
        r"\sqrt{" * 400 + "2" + "}" * 400,
        r"\int_0^{10} x^{x^{x}} \sin(x^x) dx",
        r"\sum_{n=1}^{10000000} \frac{1}{n^n}",
        "(x+y+z+w)^{400} - (x+y-z+w)^{399}",
        r"\binom{100000000}{50000000}",
    ],
)
def test_an_answer_that_is_expensive_to_evaluate_costs_no_more_than_its_limit(answer: str) -> None:
    started = time.process_time()
    assert math("", f"\\boxed{{{answer}}}", "$x^{2}-16$", cpu_seconds=0.5) == 0.0
    assert time.process_time() - started < 2.0


def test_an_operation_that_the_soft_limit_cannot_interrupt_is_ended_with_its_process() -> None:
    terms = [RewardTerm(name="math", args={"cpu_seconds": 100.0})]
    with RewardPool(terms, workers=1, timeout_seconds=1.0) as pool:
        pool.submit(0, "", r"\boxed{\int_0^{10} x^{x^{x}} \sin(x^x) dx}", "$x^{2}-16$")
        pool.submit(1, "", r"\boxed{4}", "4")
        rewards = pool.collect()
    assert (rewards[0].value, rewards[0].failures) == (0.0, ("math",))
    assert (rewards[1].value, rewards[1].failures) == (1.0, ())


def test_strict_requires_a_box() -> None:
    assert math("", "The answer is 12.", "12", strict=True) == 0.0
    assert math("", r"\boxed{12}", "12", strict=True) == 1.0


def test_sentences_are_distinguished_from_formulas() -> None:
    assert is_prose("No. Consider $x+y+z=2$ and $x+y+z=1$.")
    assert is_prose("Undefined")
    assert not is_prose(r"Solution is: $[x=1, y=2, z=-5]$")
    assert not is_prose("$45 \\mathrm{mph}$")


def test_an_empty_reference_is_an_error_of_the_data() -> None:
    with pytest.raises(ValueError, match="the reference is empty"):
        math("", r"\boxed{4}", " ")


@pytest.mark.parametrize(("name", "value"), [("strict", 1), ("cpu_seconds", 0), ("cpu_seconds", True)])
def test_a_bad_argument_is_rejected_before_the_run(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"reward.terms\[0\].args: {name}="):
        build_rewards([RewardTerm(name="math", args={name: value})])
