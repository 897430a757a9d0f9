"""Rows of the rollout files, and their rendering as text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_mega.observe.rollouts import rollout_rows, write_experts, write_rollouts
from grpo_mega.types import Completion, Prompt, Reward, Rollout


def make_rollout(reward: float = 1.0, text: str = "46") -> Rollout:
    return Rollout(
        prompt=Prompt(index=7, text="12+34=", token_ids=(1, 2), answer="46"),
        completion=Completion((4, 6, 0), (-0.5, -0.25, -0.125), "eos", 3, text),
        reward=Reward(reward, {"exact": reward}, ("format",)),
        replica=1,
    )


def test_a_row_has_all_data_for_scripts_and_replay() -> None:
    (row,) = rollout_rows([make_rollout()], [0.5], [[-1.0, -2.0, -3.0]])
    assert row == {
        "prompt": "12+34=",
        "completion": "46",
        "answer": "46",
        "reward": 1.0,
        "reward_components": {"exact": 1.0},
        "reward_failures": ["format"],
        "advantage": 0.5,
        "stop_reason": "eos",
        "policy_version": 3,
        "prompt_index": 7,
        "replica": 1,
        "prompt_ids": [1, 2],
        "completion_ids": [4, 6, 0],
        "sampler_log_probs": [-0.5, -0.25, -0.125],
        "old_log_probs": [-1.0, -2.0, -3.0],
        "loss_mask": None,
        "num_turns": 1,
        "steps": None,
        "data_set": "",
    }


def test_the_loss_mask_of_a_row_marks_tokens_of_the_environment() -> None:
    several = replace(make_rollout().completion, loss_mask=(True, False, True), num_turns=2)
    of_steps = ((0, 0.5), (2, 1.0))
    (row,) = rollout_rows([replace(make_rollout(), completion=several, steps=of_steps)], [0.0], [[-1.0, -3.0]])
    assert row["steps"] == [(0, 0.5), (2, 1.0)]
    assert (row["loss_mask"], row["num_turns"]) == ([1, 0, 1], 2)
    assert row["old_log_probs"] == [-1.0, 0.0, -3.0]
    with pytest.raises(ValueError, match=r"old_log_probs.* prompt 7 .*3 .*2"):
        rollout_rows([replace(make_rollout(), completion=several)], [0.0], [[-1.0, -2.0, -3.0]])


def test_old_log_probs_may_be_absent() -> None:
    assert [row["old_log_probs"] for row in rollout_rows([make_rollout(), make_rollout()], [0.0, 0.0], None)] == [
        None,
        None,
    ]


def test_lists_of_different_lengths_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"old_log_probs.* prompt 7 .*2 .*3"):
        rollout_rows([make_rollout()], [0.0], [[-1.0, -2.0]])
    with pytest.raises(ValueError, match="zip"):
        rollout_rows([make_rollout()], [0.0, 1.0], None)


def test_a_file_has_one_json_object_per_line_for_any_text(tmp_path: Path) -> None:
    texts = ["a\nb", "\ud800", "\u2028", "naïve \x00"]
    rows = rollout_rows([make_rollout(text=text) for text in texts], [float("nan")] * 4, None)
    path = tmp_path / "rollouts" / "step_000012.jsonl"
    write_rollouts(path, rows)
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["completion"] for row in read] == texts
    assert read[0]["advantage"] is None
    assert [p.name for p in path.parent.iterdir()] == ["step_000012.jsonl"]


def test_routing_records_are_written_beside_the_rows_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "step_000012.experts.npz"
    write_experts(path, [make_rollout(), make_rollout()])
    assert not path.parent.exists()
    records = [torch.arange(n * 4, dtype=torch.uint8).view(n, 2, 2) for n in (3, 2)]
    rollouts = [
        replace(r, completion=replace(r.completion, expert_choices=c))
        for r, c in zip((make_rollout(),) * 2, records, strict=True)
    ]
    write_experts(path, [rollouts[0], make_rollout(), rollouts[1]])
    with np.load(path) as found:
        assert found["num_tokens"].tolist() == [3, 0, 2]
        assert found["choices"].dtype == np.uint8
        np.testing.assert_array_equal(found["choices"], torch.cat(records))
    first = path.read_bytes()
    write_experts(path, [rollouts[0], make_rollout(), rollouts[1]])
    assert path.read_bytes() == first  # a resumed run writes the same file
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_rollout_without_a_reward_has_null(tmp_path: Path) -> None:
    lost = replace(make_rollout(text="lost"), reward=Reward(None, {"exact": 1.0}, ("judge",)))
    rows = rollout_rows([lost, make_rollout(0.0, "wrong")], [0.0, -1.0], None)
    assert (rows[0]["reward"], rows[0]["reward_failures"]) == (None, ["judge"])
    write_rollouts(tmp_path / "rollouts.jsonl", rows)
    assert json.loads((tmp_path / "rollouts.jsonl").read_text().splitlines()[0])["reward"] is None
