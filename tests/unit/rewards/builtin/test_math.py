"""`math` compared with hand-written labels and the answers of a mathematics course."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import build_rewards
from grpo_mega.rewards.builtin.math import math
from grpo_mega.rewards.math_answers.equality import is_prose
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
    (r"first \boxed{3}. No, \boxed{4}", "4"),
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
    (r"first \boxed{3}, then \boxed{4}", "4"),
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


EXPENSIVE = [
    "9^{9^{9}}",
    "9^9^9",
    "9**9**9",
    "{9}^{{9}^{9}}",
    "99999999!",
    "9!!!!!",
    "((3000!)!)!",
    "2^{10000000}",
    "1E1000000",
    "1E99999999999",
    "9" * 5000,
    "9" * 1900,
    "(" * 3000,
    "[" * 900,
    r"\frac{" * 400,
    r"\sqrt{" * 400 + "2" + "}" * 400,
    r"\sqrt{" * 38 + "2" + "}" * 38,
    r"\int_0^{10} x^{x^{x}} \sin(x^x) dx",
    r"\sum_{n=1}^{10000000} \frac{1}{n^n}",
    "(x+y+z+w)^{400} - (x+y-z+w)^{399}",
    r"\binom{100000000}{50000000}",
    r"\sin(10^{10000})",
    r"e^{e^{e^{10}}}",
    r"\sqrt{2} \cdot 10^{1000} + 10^{-700}",
    r"(\sqrt{2})^{20000}",
    r"\pm 1 \pm 2 \pm 3 \pm 4 \pm 5 \pm 6",
    ",".join(rf"\sqrt{{{number}}}" for number in range(200)),
    "1*" + "*".join(["99999"] * 290),
    r" \cup ".join(f"({number},{number + 2})" for number in range(100)),
]


@pytest.mark.parametrize("reference", ["$x^{2}-16$", r"$\sqrt{x}+1$", r"$\sqrt{2}, \sqrt{3}$"])
@pytest.mark.parametrize("answer", EXPENSIVE, ids=lambda answer: answer[:40])
def test_an_answer_that_would_be_expensive_to_evaluate_is_wrong_within_the_limit(answer: str, reference: str) -> None:
    started = time.process_time()
    assert math("", f"\\boxed{{{answer}}}", reference, cpu_seconds=2.0) == 0.0
    assert time.process_time() - started < 2.0


def test_no_answer_needs_much_memory() -> None:
    program = (
        "import json, sys\n"
        "from grpo_mega.rewards.builtin.math import math\n"
        "answers = json.load(sys.stdin)\n"
        "assert not any(math('', f'\\\\boxed{{{a}}}', b) for a in answers for b in ('x+1', '\\\\sqrt{2}') if a != b)\n"
        "assert all(math('', f'\\\\boxed{{{a}}}', a) for a in answers if len(a) < 1500 and a[-1] not in '([{')\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    # not ru_maxrss, which a new program inherits from the process that started it
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(EXPENSIVE), capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 300 * 10**6


def test_a_scoring_that_uses_its_time_is_a_counted_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def search_forever(answer: str, reference: str) -> bool:
        while True:
            pass

    monkeypatch.setattr("grpo_mega.rewards.builtin.math.is_right", search_forever)
    with pytest.raises(TimeoutError, match=r"cpu_seconds=0\.05"):
        math("", r"\boxed{4}", "4", cpu_seconds=0.05)


def test_expensive_answers_leave_the_worker_process_running() -> None:
    with RewardPool([RewardTerm(name="math")], workers=1, timeout_seconds=30.0) as pool:
        workers = pool.worker_pids
        for key, answer in enumerate(EXPENSIVE):
            pool.submit(key, "", f"\\boxed{{{answer}}}", "$x^{2}-16$")
        pool.submit(len(EXPENSIVE), "", r"\boxed{4}", "4")
        rewards = pool.collect()
        assert pool.worker_pids == workers
    assert [key for key, item in rewards.items() if item.value or item.failures] == [len(EXPENSIVE)]
    assert rewards[len(EXPENSIVE)].failures == ()


def test_a_thought_contains_no_answer() -> None:
    assert math("", r"<think> \boxed{4} </think> So \boxed{5}", "5") == 1.0
    assert math("", r"<think> \boxed{4} </think> I do not know.", "4") == 0.0
    assert math("", r"<think> \boxed{4}", "4") == 0.0
    assert math("Question <think>\n", r"so \boxed{4}", "4") == 0.0
    assert math("Question <think>\n", r"so </think> \boxed{4}", "4") == 1.0


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
