"""grpo_mega.observe.watch.view: the numbers, and that no escape sequence reaches the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

from grpo_mega.observe.watch.followed_run import FollowedRun
from grpo_mega.observe.watch.view import sparkline, view
from tests.helpers.reported_runs import HOSTILE, metrics_line, write_run


def lines_of(folder: Path, now: float = 0.0, width: int = 80) -> list[str]:
    run = FollowedRun(folder)
    run.poll()
    return view(run, now, width)


def test_a_running_run_shows_step_eta_curves_phases_and_rollouts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=6)
    (folder / "config.yaml").write_text("train: {steps: 16}\n")
    (folder / "summary.json").write_text(json.dumps({"status": "interrupted"}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics_line(7) | {"wall_time": 100.0}) + "\n")
    lines = lines_of(folder, now=105.0)
    assert lines[1] == "step 7/16  ETA 18.9s  last line 5.0s ago"
    reward = next(line for line in lines if line.split()[0] == "reward")
    assert re.search("▁.*█$", reward)
    assert any("█ rollout 1 s" in line for line in lines)
    assert any(line.startswith("rollout, reward 1, eos: ") for line in lines)
    assert max(map(len, lines)) <= 80


def test_no_escape_of_a_completion_reaches_the_terminal(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", text=HOSTILE)
    (folder / "summary.json").write_text(json.dumps({"status": "\x1b[2J", "verdict": "\x1b]0;owned\x07"}))
    text = "\n".join(lines_of(folder, width=400))
    assert r"\x1b[2J" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text)


def test_an_empty_folder_says_that_no_step_is_written(tmp_path: Path) -> None:
    assert lines_of(tmp_path, width=400) == [f"{tmp_path}: no step is written yet"]


def test_the_remedies_of_alarms_and_of_the_verdict_are_whole_in_narrow_terminals(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=6)
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(metrics_line(s) | {"train/kl": 50}) + "\n" for s in (7, 8, 9))
    verdict = "did not learn: " + "the rewards of all groups are equal; " * 5 + "look at the rollouts"
    (folder / "summary.json").write_text(json.dumps({"status": "done", "verdict": verdict}))
    lines = lines_of(folder, width=50)
    text = " ".join(" ".join(lines).split())
    assert "ALARM far from the reference since step 7" in text
    assert "look at optimizer.lr and algorithm.kl_coef" in text
    assert f"verdict: {verdict}" in text
    assert max(map(len, lines)) <= 50


def test_a_sparkline_has_the_shape_of_its_values() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 80) == "▁▂▃▄▅▆▇█"
    assert sparkline([3.0, 3.0], 80) == "▄▄"
    assert len(sparkline(list(range(1000)), 56)) == 56
    assert sparkline([0] * 50 + [1] * 50, 4) == "▁▁██"
