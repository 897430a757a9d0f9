"""Repetition and scripts of answers, by hand and against a plain loop."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from grpo_mega.observe.metric_table import require_known
from grpo_mega.trainer import text_metrics as text_metrics_module
from grpo_mega.trainer.text_metrics import repetition_sums, script_sums, text_metrics


def ragged(answers: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *map(len, answers)])
    return np.array([token for answer in answers for token in answer], dtype=np.int32), offsets


def test_an_ngram_is_repeated_within_its_answer_only() -> None:
    answers = [[1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3, 4], [9, 9, 9]]
    # the first answer: 1234 2341 3412 4123 1234, of which the last is repeated; the third has no 4-gram
    assert repetition_sums(*ragged(answers)).tolist() == [1, 6]
    assert repetition_sums(*ragged([[7] * 10])).tolist() == [6, 7]
    assert repetition_sums(*ragged([[1, 2]])).tolist() == [0, 0]
    assert repetition_sums(*ragged([[], [1, 2, 3, 4], []])).tolist() == [0, 1]


@pytest.mark.parametrize(("seed", "chunk_tokens"), [(0, 2**18), (1, 100), (2, 1)])
def test_repetition_equals_a_plain_loop(monkeypatch: pytest.MonkeyPatch, seed: int, chunk_tokens: int) -> None:
    monkeypatch.setattr(text_metrics_module, "_CHUNK_TOKENS", chunk_tokens)
    chance = random.Random(seed)
    answers = [[chance.randrange(3) for _ in range(chance.randrange(60))] for _ in range(20)]
    repeated = total = 0
    for answer in answers:
        grams = [tuple(answer[i : i + 4]) for i in range(len(answer) - 3)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    assert repetition_sums(*ragged(answers)).tolist() == [repeated, total]


def test_letters_of_a_script_that_the_prompt_does_not_use_are_counted() -> None:
    prompts = ["What is 2+2?", "2+2=", "\u4f60\u597d", "\u4f60\u597d"]
    answers = ["It is 4 \u4f60\u597d.", "4 is \u043e\u043a", "\u56db four", "\uc0ac"]
    # letters: 4 Latin + 2 Han; 2 Latin + 2 Cyrillic; 1 Han + 4 Latin; 1 Hangul
    assert script_sums(prompts, answers).tolist() == [2 + 2 + 4 + 1, 6 + 4 + 5 + 1]


def test_numbers_symbols_and_broken_characters_are_no_letters() -> None:
    assert script_sums(["x", "x"], ["1 + 2 = 3 \u2192 \U0001f600", "\ud800 \x1b[31m"]).tolist() == [0, 1]  # the m


def test_the_metrics_are_fractions_of_the_sums_of_all_ranks() -> None:
    found = text_metrics(np.array([1.0, 6.0]), np.array([0.0, 0.0]))
    require_known(found)
    assert found == {"rollout/repeated_ngram_fraction": pytest.approx(1 / 6), "rollout/other_script_fraction": 0.0}


def test_a_million_tokens_take_no_python_loop_per_token() -> None:
    tokens = np.random.default_rng(0).integers(0, 150_000, 1_000_000)
    started = time.process_time()
    repetition_sums(tokens, np.arange(0, 1_000_001, 1000))
    assert time.process_time() - started < 10.0
