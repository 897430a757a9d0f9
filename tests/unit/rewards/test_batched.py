"""Batched rewards return every completion, whatever the scorer does, and the pool adds them to the other rewards."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import build_rewards
from grpo_mega.rewards.batched import ScoringRow, ThreadedScorer
from grpo_mega.rewards.pool import RewardPool
from grpo_mega.types import Reward, UserError

USER_REWARDS = """
from grpo_mega.rewards import batched_reward

class Scorer:
    def __init__(self, factor):
        self.factor, self.rows, self.closed = factor, {}, False
    def submit(self, key, row):
        self.rows[key] = row
    def collect(self):
        rows, self.rows = self.rows, {}
        if any("explode" in row.completion for row in rows.values()):
            raise RuntimeError("out of memory")
        special = {"bad": ValueError("no idea"), "nan": float("nan"), "text": "1", "high": 99.0}
        return {k: special.get(r.completion, len(r.completion) * self.factor) for k, r in rows.items()
                if r.completion != "lost"}
    def close(self):
        self.closed = True

@batched_reward(low=-1.0, high=10.0, range_of=lambda factor=1.0: (-1.0, 10.0 * factor))
def size(factor=1.0):
    return Scorer(factor)
"""


@pytest.fixture(autouse=True)
def user_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_batched.py").write_text(USER_REWARDS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


SIZE = RewardTerm(name="user_batched:size", weight=0.5)


def score_all(terms: list[RewardTerm], completions: list[str]) -> dict[int, Reward]:
    with RewardPool(terms, workers=1, timeout_seconds=60.0) as pool:
        for key, completion in enumerate(completions):
            pool.submit(key, "prompt", completion, "7")
        return pool.collect()


def test_batched_and_other_rewards_add_up_in_the_order_of_the_terms() -> None:
    rewards = score_all([SIZE, RewardTerm(name="gsm8k", weight=2.0)], ["#### 7", "8"])
    assert rewards[0] == Reward(value=5.0, components={"size": 6.0, "gsm8k": 1.0}, failures=())
    assert list(rewards[0].components) == ["size", "gsm8k"]
    assert rewards[1] == Reward(value=0.5, components={"size": 1.0, "gsm8k": 0.0}, failures=())


def test_without_other_rewards_there_are_no_workers() -> None:
    with RewardPool([SIZE], workers=2, timeout_seconds=5.0) as pool:
        assert pool.worker_pids == ()
        for step in range(2):
            pool.submit(0, "", "x" * step, "")
            assert pool.collect() == {0: Reward(value=0.5 * step, components={"size": float(step)})}


def test_a_completion_without_a_value_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    completions = ["bad", "ok", "nan", "text", "high", "lost"]
    with caplog.at_level(logging.WARNING):
        rewards = score_all([SIZE, RewardTerm(name="exact")], completions)
    assert [rewards[key].value for key in range(6)] == [None, 1.0, None, None, None, None]
    assert [rewards[key].failures for key in range(6)] == [("size",), (), *[("size",)] * 4]
    assert rewards[1].components == {"size": 2.0, "exact": 0.0}
    assert [rewards[key].components for key in (0, 2, 3, 4, 5)] == [{"exact": 0.0}] * 5
    raised, bad = (record.getMessage() for record in caplog.records)
    assert "size raised an exception for 1 of 6 completions, which are left out of the loss" in raised
    assert "completion='bad'" in raised
    assert "ValueError: no idea" in raised
    assert "size returned no number in its range for 4 of 6 completions" in bad


def test_a_completion_without_a_value_scores_the_floor_on_request() -> None:
    with RewardPool([SIZE], workers=1, timeout_seconds=60.0, on_failure="floor") as pool:
        pool.submit(0, "", "nan", "")
        assert pool.collect()[0] == Reward(value=-0.5, components={"size": -1.0}, failures=("size",))


def test_a_scorer_that_raises_fails_for_all_completions_without_an_error(caplog: pytest.LogCaptureFixture) -> None:
    rewards = score_all([SIZE], ["explode", "ok"])
    assert rewards[0] == rewards[1] == Reward(value=None, failures=("size",))
    assert 'raise RuntimeError("out of memory")' in caplog.text  # the traceback


def test_a_batched_reward_gets_only_the_rows_of_its_sets() -> None:
    with RewardPool(
        [SIZE.model_copy(update={"datasets": ("a",)}), RewardTerm(name="exact")], workers=1, timeout_seconds=60.0
    ) as pool:
        pool.submit(0, "", "xx", "xx", dataset="a")
        pool.submit(1, "", "xx", "xx", dataset="b")
        assert {key: reward.components for key, reward in pool.collect().items()} == {
            0: {"size": 2.0, "exact": 1.0},
            1: {"exact": 1.0},
        }


def test_the_range_may_depend_on_the_arguments() -> None:
    (component,) = build_rewards([RewardTerm(name="user_batched:size", args={"factor": 3.0})])
    assert (component.low, component.high, component.is_batched) == (-1.0, 30.0, True)
    assert component("", "abc", "") == 9.0


def test_the_error_for_an_unknown_argument_of_a_batched_reward_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"did you mean 'factor'\? it takes: factor"):
        build_rewards([RewardTerm(name="user_batched:size", args={"facto": 3.0})])


def test_rows_are_scored_in_batches_by_the_requested_threads_and_submit_does_not_wait() -> None:
    sizes, threads, most, finished = [], set(), [0, 0], []
    lock, gate = threading.Lock(), threading.Event()

    def score(rows: Sequence[ScoringRow]) -> list[float]:
        with lock:
            sizes.append(len(rows))
            threads.add(threading.get_ident())
            most[0] += 1
            most[1] = max(most)
        gate.wait(60.0)
        with lock:
            most[0] -= 1
            finished.append(len(rows))
        return [float(len(row.completion)) for row in rows]

    scorer = ThreadedScorer(score, batch_size=4, concurrency=2)
    for key in range(20):
        scorer.submit(key, ScoringRow("", "x" * key, ""))
    assert finished == []
    while most[0] < 2:
        time.sleep(0.01)
    gate.set()
    assert scorer.collect() == {key: float(key) for key in range(20)}
    assert max(sizes) == 4
    assert (len(threads), most[1]) == (2, 2)
    assert scorer.collect() == {}
    scorer.close()


def test_the_rows_of_a_score_that_raises_or_returns_too_many_values_get_the_reason() -> None:
    def score(rows: Sequence[ScoringRow]) -> list[float]:
        if rows[0].completion == "raise":
            raise KeyError("gone")
        return [1.0] * (len(rows) + (rows[0].completion == "more"))

    scorer = ThreadedScorer(score, batch_size=1, concurrency=1)
    for key, completion in enumerate(["raise", "more", "fine"]):
        scorer.submit(key, ScoringRow("", completion, ""))
    values = scorer.collect()
    assert isinstance(values[0], KeyError)
    assert str(values[1]) == "2 values for 1 completions"
    assert values[2] == 1.0
    scorer.close()


def test_close_does_not_wait_for_running_requests() -> None:
    never, finished = threading.Event(), []

    def score(rows: Sequence[ScoringRow]) -> list[float]:
        finished.append(never.wait(60.0))
        return [0.0] * len(rows)

    scorer = ThreadedScorer(score, batch_size=1, concurrency=1)
    scorer.submit(0, ScoringRow("", "", ""))
    scorer.close()
    assert isinstance(scorer.collect()[0], TimeoutError)
    assert finished == []
    never.set()


def test_a_late_value_has_failed_and_is_not_used_in_the_next_step() -> None:
    gates = [threading.Event(), threading.Event()]

    def score(rows: Sequence[ScoringRow]) -> list[float]:
        gates[int(rows[0].reference)].wait(60.0)
        return [float(rows[0].reference)] * len(rows)

    scorer = ThreadedScorer(score, batch_size=1, concurrency=1, wait_seconds=0.2)
    for key in range(3):
        scorer.submit(key, ScoringRow("", "", "0"))
    late = scorer.collect()
    assert [str(late[key]) for key in range(3)] == ["no value within 0.2 s of the end of sampling"] * 3
    gates[1].set()
    scorer.submit(0, ScoringRow("", "", "1"))
    gates[0].set()
    limit = time.monotonic() + 60.0
    while (found := scorer.collect()) == {} or isinstance(found[0], Exception):
        assert time.monotonic() < limit
        scorer.submit(0, ScoringRow("", "", "1"))
    assert found == {0: 1.0}
    scorer.close()
