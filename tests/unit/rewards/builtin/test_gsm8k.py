"""`gsm8k` compared with labels written by hand, and with every reference of GSM8K."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_mega.rewards.builtin.gsm8k import final_answer, gsm8k, reference_answer

NINES = "9" * 5000

# (completion, reference): what a careful reader would mark as right. One row per form of a number or of an ending.
RIGHT = [
    ("The final answer is: 72 for 3 people.", "72"),
    ("Final answer: 72 (for 3 people)", "72"),
    ("**Answer:** 72 for 3 people", "72"),
    ("answer: 72, as 3 * 24 = 72", "72"),
    ("24 answers * 2 points/answer = 48. She has 64", "64"),
    ("5 + 5 = 10.\n\n####   10  \n", "10"),
    ("#### 1\u00a0234", "1234"),
    ("#### 1\u202f234.5", "1234.5"),
    ("#### 4.5e2", "450"),
    ("#### 3 \u00d7 10^{4}", "30000"),
    ("#### \u2013 5", "-5"),
    ("#### -\u00bd", "-1/2"),
    ("#### 2,520,000 miles", "2520000"),
    ("It is 2.5 million.", "2500000"),
    ("#### 3rd floor", "3"),
    ("the area is 5 m^2", "5"),
    ("the area is 5 m^{2}", "5"),
    ("_72_", "72"),
    ("#### 72", "72"),
    ("#### $1,234.50", "1234.5"),
    ("#### 50%", "50"),
    ("#### 5 km", "5"),
    ("#### \u22125", "-5"),
    ("#### +5", "5"),
    ("#### 72.", "72"),
    ("#### **72**", "72"),
    ("**#### 72**", "72"),
    (r"#### \$18", "18"),
    ("#### -$5", "-5"),
    ("#### $-5", "-5"),
    ("#### 1 234", "1234"),
    ("#### 007", "7"),
    ("#### 1e3", "1000"),
    (r"#### 1.5 \times 10^3", "1500"),
    ("#### 1/2", "0.5"),
    ("#### 2 1/2", "2.5"),
    ("#### 2\xbd", "2.5"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{-\frac{1}{2}}", "-1/2"),
    (r"\boxed{1\frac12}", "1.5"),
    (r"\boxed{72\text{ apples}}", "72"),
    (r"\boxed{\text{72 apples}}", "72"),
    (r"\boxed{1{,}234}", "1234"),
    (r"\boxed{1\,234}", "1234"),
    (r"$\boxed{\$18}$.", "18"),
    (r"\boxed{50\%}", "50"),
    ("The answer is 72.", "72"),
    ("So 10 - 5 = 5.", "5"),
    ("she has 72 apples.", "72"),
    ("The total is **$1,234.50**.", "1234.5"),
    ("the answer is 72 for 3 people.", "72"),
    ("#### Step 1: add\nfoo 3\n#### Step 2: mul\n\\boxed{9}", "9"),
    ("#### 1. Add\nfoo\n#### 2. Mul\n7", "7"),
    ("#### 4 million", "4000000"),
    ("#### 3 + 4 = 7", "7"),
    ("#### x = 5", "5"),
    ("####72", "72"),
    ("#### \n72", "72"),
    ("#### Janet makes $18 per day.", "18"),
    ("#### 2. ", "2"),
    (r"#### \frac{3}{4}", "0.75"),
    ("#### $72$", "72"),
    (r"#### \(72\)", "72"),
    ("#### 72 apples (6 dozen)", "72"),
    ("#### 1,00,000", "100000"),
    ("...72", "72"),
    ("#### .5", "0.5"),
    ("x is 5^2 = 25", "25"),
    ("#### <<9*2=18>>18", "18"),
    ("Answer: 72 km/h", "72"),
    (r"\boxed{5 m^2}", "5"),
    ("#### 5 m\xb2", "5"),
    ("#### 72\n\nQuestion: foo 5", "72"),
    ("#### 5\nNo, that is wrong.\n#### 6", "6"),
    (r"The answer is $10\,000$", "10000"),
    (r"#### 90^\circ", "90"),
    ("#### 90\xb0", "90"),
    ("#### \uff17\uff12", "72"),
    ("72\n####", "72"),
    ("#### 10 000 000", "10000000"),
    ("#### the answer is 72", "72"),
    (r"the final answer is: $\boxed{72}$", "72"),
    ("#### 72 days.", "72"),
    ("#### 1-bedroom", "1"),
    ("It costs -$5", "-5"),
    ("x=-5", "-5"),
    ("#### 12:", "12"),
    ("I think it is 5, not 6. #### 5", "5"),
    ("#### 2nd", "2"),
    ("cost: 5\u20ac", "5"),
    ("#### \xa35", "5"),
    ("#### 72 </s>", "72"),
    ("####  72<|endoftext|>", "72"),
    ("#### 6 x 3 = 18 eggs", "18"),
    ("So Tom has 5 apples, i.e. 5.", "5"),
    ("#### 30%.", "30"),
    ("#### USD 30", "30"),
    ("#### 30 USD", "30"),
    ("#### US$30", "30"),
    (r"\boxed{\textbf{72}}", "72"),
    (r"\boxed{\mathbf{72}}", "72"),
    (r"\[ \boxed{72} \]", "72"),
]

# What a careful reader would mark as wrong: another number, a hedge, an unfinished expression, no number at all.
WRONG = [
    ("The answer is 5-7.", "7"),
    ("maybe 3 or 4", "4"),
    ("#### 1e99999", "1"),
    ("#### 72 or 73", "72"),
    ("#### 72, 73", "72"),
    ("#### 72 73", "72"),
    ("#### 5:30", "5"),
    ("#### 1,23", "1"),
    ("#### 12,34", "12"),
    ("#### 7", "72"),
    (r"\boxed{72, 73}", "72"),
    (r"\boxed{72", "73"),
    ("#### 5-7", "5"),
    ("#### 3 + 4", "3"),
    ("#### 1/0", "1"),
    (f"#### {NINES}", "9"),
    ("", "0"),
    ("#### 5^2", "5"),
    ("no", "1"),
    ("#### 72 + x = ", "72"),
    ("#### 5\xb2", "5"),
    ("#### 7.2", "72"),
    ("#### -72", "72"),
    ("it is 3 million", "7"),
    ("#### 1.234.567", "1.234"),
]


def test_a_right_answer_scores_one_in_any_spelling() -> None:
    for completion, reference in RIGHT:
        assert gsm8k("", completion, reference) == 1.0, completion
        assert gsm8k("", completion, f"Some <<1+1=2>>2 steps.\n#### {reference}") == 1.0, completion


def test_a_right_answer_to_another_question_scores_zero() -> None:
    for completion, reference in RIGHT:
        (value,) = reference_answer(reference)
        assert gsm8k("", completion, str(value + 1)) == 0.0, completion
        assert gsm8k("", completion, str(value * 10 + 7)) == 0.0, completion


def test_a_wrong_or_hedged_answer_scores_zero() -> None:
    assert [pair for pair in WRONG if gsm8k("", *pair) != 0.0] == []


def test_the_marker_is_preferred_to_the_box_and_the_box_to_the_last_number() -> None:
    assert gsm8k("", "#### 5\nas \\boxed{6} says after 7 days", "5") == 1.0
    assert gsm8k("", r"it is \boxed{6} after 7 days", "6") == 1.0
    assert gsm8k("", "it is 6; then 7", "7") == 1.0


def test_strict_reads_no_number_from_prose() -> None:
    assert gsm8k("", "The answer is 72.", "72", strict=True) == 0.0
    assert gsm8k("", "#### 72", "72", strict=True) == 1.0
    assert gsm8k("", r"\boxed{72}", "72", strict=True) == 1.0


def test_values_are_compared_exactly_never_as_floats() -> None:
    assert gsm8k("", "#### 0.1", "1/10") == 1.0
    assert gsm8k("", "#### 0.30000000000000004", "0.3") == 0.0
    assert gsm8k("", "#### 9007199254740993", "9007199254740992") == 0.0
    assert gsm8k("", "#### 33.33", "100/3") == 0.0


@pytest.mark.parametrize("reference", ["", "no number", "#### none", "5:30"])
def test_a_reference_without_a_number_is_an_error_in_the_data(reference: str) -> None:
    with pytest.raises(ValueError, match="does not end in a number"):
        gsm8k("", "#### 5", reference)


def gsm8k_references(folder: Path) -> list[str]:
    files = [folder / name for name in ("train.jsonl", "test.jsonl") if (folder / name).is_file()]
    return [json.loads(line)["answer"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]


REWRITINGS = (
    "#### {answer}",
    "So it is clear.\n#### ${answer}",
    "#### {answer} apples",
    "#### {answer}.",
    "#### **{answer}**",
    "**#### {answer}**",
    "####{answer}\n\n",
    "#### {answer}.00",
    "#### {commas}",
    "#### {plain}%",
    "Thus 3 + 4 = 7.\n$$\\boxed{{{answer}}}$$",
    "\\boxed{{\\${latex}}}",
    "\\boxed{{{answer}\\text{{ apples}}}} after 3 days.",
    "After 3 days, the answer is {answer} apples.",
    "**Final Answer:** ${commas}",
    "Adding 1 and 2, she has **{plain}** of them.",
)


def test_every_gsm8k_reference_equals_its_rewritings_and_differs_from_the_next_one(gsm8k_dir: Path) -> None:
    references = gsm8k_references(gsm8k_dir)
    assert len(references) > 1000
    wrong = []
    for index, reference in enumerate(references):
        answer = reference.rpartition("####")[2].strip()
        neighbor = next(
            r for r in references[index - 1 :: -1] + references if r.rpartition("####")[2].strip() != answer
        )
        plain = answer.replace(",", "")
        commas = f"{int(plain):,}"
        assert gsm8k("", reference, reference) == 1.0
        assert gsm8k("", neighbor, reference) == 0.0
        # one rewriting each, all of them over the file, every one for the answers with a comma or a sign
        rewritings = REWRITINGS if not answer.isdigit() or index < 100 else REWRITINGS[index % len(REWRITINGS) :][:1]
        for form in rewritings:
            text = form.format(answer=answer, plain=plain, commas=commas, latex=commas.replace(",", "{,}"))
            if gsm8k("", text, reference) != 1.0 or gsm8k("", text, neighbor) != 0.0:
                wrong.append((text, answer))
    assert wrong == []


# Ways to name a right answer without answering with it: `a` is right, `b` is wrong.
EVASIONS = (
    "#### {a} or {b}",
    "#### {b} or {a}",
    "#### {a}, {b}",
    "#### {a} ({b})",
    "#### {a} apples or {b} apples",
    "#### {a}\n#### {b}",
    "#### {b}\n#### {a}",
    "#### {a}\nor {b}",
    "\\boxed{{{a}}} or \\boxed{{{b}}}",
    "\\boxed{{{b}}}, \\boxed{{{a}}}",
    "\\boxed{{{b} \\text{{ or }} {a}}}",
    "The answer is {a} or {b}.",
    "The answer is {b} or {a}.",
    "It is {b} or {a}",
    "The answer is not {a}.",
    "<think>#### {a}</think>",
    "<think>#### {a}</think>#### {b}",
    "#### not {a}",
    "#### at least {a}",
    "#### > {a}",
    "#### {a} + 1",
    "#### {a}x",
    "#### {a}^2",
    "#### {a}.5",
    "#### 7{a}",
    "#### {a}7",
    "#### \\sqrt{{{a}}}",
    "#### {a}\u4e07",
    "#### {a} = {b}",
)


def test_no_evasion_of_a_gsm8k_answer_scores(gsm8k_dir: Path) -> None:
    references = gsm8k_references(gsm8k_dir)
    answers = [reference.rpartition("####")[2].strip() for reference in references]
    wrong = []
    for index, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        other = next(b for b in answers[index - 1 :: -1] + answers if b.replace(",", "") != answer.replace(",", ""))
        # three each, all of them over the file, every one for the answers with a comma or a sign
        chosen = EVASIONS if not answer.isdigit() else [EVASIONS[(3 * index + i) % len(EVASIONS)] for i in range(3)]
        for form in chosen:
            text = form.format(a=answer, b=other)
            if gsm8k("", text, reference) != 0.0:
                wrong.append((text, answer))
    assert wrong == []


def test_a_whole_solution_without_its_marker_still_ends_in_the_answer(gsm8k_dir: Path) -> None:
    references = gsm8k_references(gsm8k_dir)
    agreeing = sum(
        gsm8k("", f"{solution}\nSo the result is {answer.strip()}.", reference)
        for reference in references
        for solution, _, answer in [reference.partition("####")]
    )
    assert agreeing == len(references)


@pytest.mark.parametrize(
    ("prompt", "completion", "right"),
    [
        ("What is the profit in millions of dollars?", "#### $4 million", 1),
        ("How many million dollars does he earn?", "#### 4000000", 1),
        ("How many dozens does she buy?", "#### 4 dozen", 1),
        ("How many dozens does she buy?", "#### 4", 1),
        ("How many dozens does she buy?", "#### 4 million", 0),
        ("She buys 4 dozen eggs. How many eggs?", "#### 4 dozen", 0),
        ("q", "#### $4 million", 0),
        ("", "#### 4 dozen", 0),
    ],
)
def test_a_multiple_answers_a_question_that_asks_for_this_unit(prompt: str, completion: str, right: int) -> None:
    assert gsm8k(prompt, completion, "4") == right


def test_a_word_behind_a_number_multiplies_it() -> None:
    assert final_answer("#### $4 million", strict=True) == (4_000_000,)
    assert final_answer("#### 5-dozen", strict=True) == (60,)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"\boxed{6}!", "6"),  # a factorial
        (r"It pays after \boxed{13} years.", "13"),
        ("The answer is 42 (6 x 7).", "42"),
    ],
)
def test_these_right_answers_are_not_recognized_yet(completion: str, answer: str) -> None:
    assert gsm8k("", completion, answer) == 0.0
