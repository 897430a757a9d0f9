"""grpo_mega.observe.report.rollout_sample: which rollouts are shown, how they are cut, and the budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from grpo_mega.observe.report.rollout_sample import MAX_CHARACTERS, MAX_STEPS, MAX_TOKENS, sample_rollouts
from tests.helpers.reported_runs import HOSTILE, write_run


def texts(ids: Sequence[int]) -> list[str]:
    return [f"<{i}>" for i in ids]


def test_the_groups_of_a_short_run_are_all_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=4, groups=3, members=4)
    found = sample_rollouts(run / "rollouts", {}, [], texts)
    assert len(found.groups) == 4 * 3
    group = next(g for g in found.groups if g["step"] == 3)
    assert {a["reward"] for a in group["answers"]} == {0.0, 1.0}
    assert (group["size"], group["degenerate"]) == (4, False)
    assert group["answers"][0]["pieces"] == ["<2>", "<3>", "<4>", "<5>", "<6>", "<7>"]
    assert found.problems == []


def test_the_worst_mismatch_comes_first_with_its_token(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=4)
    worst = sample_rollouts(run / "rollouts", {}, [], texts).worst[0]
    assert (worst["step"], worst["prompt_index"], worst["position"]) == (3, 3001, 2)
    assert worst["mismatch"] == pytest.approx(-1e-3, rel=1 / 32)
    assert worst["text"] == "<4>"


def test_steps_are_chosen_by_the_stated_rule(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=150, groups=1, members=2)
    found = sample_rollouts(run / "rollouts", {8: 5.0, 9: 0.1}, [77], None)
    steps = {group["step"] for group in found.groups}
    assert {1, 8, 77, 150} <= steps
    assert len(steps) <= MAX_STEPS + 12
    assert "of 150 steps" in found.rule
    assert "pieces" not in found.groups[0]["answers"][0]


def test_long_texts_are_cut_with_a_count_and_the_budget_holds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3, groups=6, members=8, text="x" * 1_000_000, num_tokens=1000)
    found = sample_rollouts(run / "rollouts", {}, [], texts, max_bytes=300_000)
    assert len(json.dumps(found.groups)) <= 300_000
    answer = found.groups[0]["answers"][0]
    assert answer["text"] == "x" * MAX_CHARACTERS + " [996,000 more characters]"
    assert (len(answer["pieces"]), answer["tokens"]) == (MAX_TOKENS, 1000)
    assert {group["step"] for group in found.groups} == {1, 2, 3}, "every step has its part of the budget"


def test_terminal_escapes_and_broken_unicode_are_written_as_escapes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1, text=HOSTILE)
    text = sample_rollouts(run / "rollouts", {}, [], None).groups[0]["answers"][0]["text"]
    assert "\x1b" not in text
    assert r"\x1b[2J" in text
    assert r"\ud800" in text


def test_a_damaged_step_is_a_problem_and_the_others_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    damage_step(run / "rollouts", 2)
    found = sample_rollouts(run / "rollouts", {}, [], None)
    assert {group["step"] for group in found.groups} == {1, 3}
    assert any("step_000002" in problem for problem in found.problems)


def damage_step(rollouts: Path, step: int) -> None:
    (path,) = rollouts.glob(f"step_{step:06d}*")
    for file in [path] if path.is_file() else path.iterdir():
        file.write_bytes(b"\xff\x00 not rollouts")


def test_a_run_without_rollouts_has_none(tmp_path: Path) -> None:
    found = sample_rollouts(tmp_path / "rollouts", {}, [], None)
    assert (found.groups, found.worst, found.problems) == ([], [], [])
