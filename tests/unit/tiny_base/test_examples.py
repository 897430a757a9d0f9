"""Worked examples of the tiny bases: their mistakes, their formats, and the errors of their files."""

import random
from pathlib import Path

import pytest

from grpo_mega.data import arithmetic
from grpo_mega.tiny_base.examples import arithmetic_examples, gsm8k_examples, with_mistake
from grpo_mega.types import UserError
from tests.helpers.gsm8k_rows import write_gsm8k


def test_mistakes_are_never_the_right_answer() -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(3000):
        number = str(rng.randrange(199))
        flawed = with_mistake(number, rng)
        assert flawed.strip() != number
        assert flawed.strip() == flawed != ""
        seen.add("blank" if " " in flawed else "missing" if len(flawed) < len(number) else "digit")
    assert seen == {"blank", "missing", "digit"}


def test_the_requested_fraction_of_arithmetic_examples_is_flawed_and_all_are_pretraining_pairs() -> None:
    draw, rng = arithmetic_examples(0.5), random.Random(0)
    right = {arithmetic.question(pair): arithmetic.answer(pair) for pair in arithmetic.pairs("pretrain")}
    examples = [draw(rng) for _ in range(4000)]
    share = sum(right[prompt] != completion for prompt, completion in examples) / len(examples)
    assert 0.46 < share < 0.54


def test_gsm8k_examples_are_the_last_calculation_with_and_without_the_format(tmp_path: Path) -> None:
    draw, rng = gsm8k_examples(write_gsm8k(tmp_path / "t.jsonl"), 0.5, max_bytes=100), random.Random(0)
    assert {draw(rng) for _ in range(200)} == {
        ("Question 0?", "\n40+0=40\n#### 40"),
        ("Question 0?", "\n40+0=40\n40"),
        ("Question 1?", "\n40+1=41\n#### 41"),
        ("Question 1?", "\n40+1=41\n41"),
    }, "the first half of the file, nothing else"


def test_a_byte_order_mark_at_the_start_of_a_gsm8k_file_is_skipped(tmp_path: Path) -> None:
    path = write_gsm8k(tmp_path / "t.jsonl")
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert gsm8k_examples(path, 0.5, max_bytes=100)(random.Random(0))[0].startswith("Question")


def test_the_requested_fraction_of_examples_calls_the_calculator(tmp_path: Path) -> None:
    path, rng = write_gsm8k(tmp_path / "t.jsonl"), random.Random(0)
    draw = gsm8k_examples(path, 0.5, max_bytes=100, tool_fraction=0.5)
    drawn = [draw(rng)[1] for _ in range(400)]
    assert {text for text in drawn if "<<" in text} == {
        f"\n<<40+{i}>>4{i}\n{mark}4{i}" for i in (0, 1) for mark in ("", "#### ")
    }
    assert 150 < sum("<<" in text for text in drawn) < 250
    sums, rng = arithmetic_examples(0.5, tool_fraction=0.5), random.Random(0)
    for question, completion in (sums(rng) for _ in range(200)):
        if completion.startswith("<<"):
            called, _, result = completion.removeprefix("<<").partition(">>")
            assert (called + "=", int(result)) == (question, sum(map(int, called.split("+"))))


def test_bad_gsm8k_files_are_user_errors(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"question": "q", "answer": "no mark"}\n')
    with pytest.raises(UserError, match=r"t\.jsonl:1: not a GSM8K example"):
        gsm8k_examples(path, 0.5, max_bytes=100)
    path.write_text("")
    with pytest.raises(UserError, match="is empty"):
        gsm8k_examples(path, 0.5, max_bytes=100)
    with pytest.raises(UserError, match=r"no example of at most 20 bytes.*max_positions"):
        gsm8k_examples(write_gsm8k(path), 0.5, max_bytes=20)
