"""grpo_mega.observe.report.run_data: whole folders, and every kind of incomplete one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_mega.observe.report.run_data import MAX_POINTS, MAX_TIMELINE_STEPS, read_run
from grpo_mega.types import UserError
from tests.helpers.reported_runs import metrics_line, write_run


def test_a_whole_folder_has_no_problems(tmp_path: Path) -> None:
    data = read_run(write_run(tmp_path / "run", steps=6))
    assert data.problems == []
    assert data.verdict == ["The run is done after step 6.", "It learned: held-out accuracy 0.300 -> 0.900."]
    assert data.steps == [1, 2, 3, 4, 5, 6]
    assert data.curves["time/step_seconds"] == [2.1, 2.2, 2.0, 2.1, 2.2, 2.0]
    assert [(c["step"], c["complete"]) for c in data.checkpoints] == [(6, True), (7, False)]
    assert data.config["sampling.group_size"] == "4"
    assert data.defaults["sampling.temperature"] == "1.0"
    assert [line["step"] for line in data.timeline] == [1, 2, 3, 4, 5, 6]
    charts = {(c["section"], c["title"]): [n["name"] for n in c["names"]] for c in data.charts()}
    assert charts["learning", "reward"] == ["reward/mean"]
    assert next(section for section, _ in charts) == "learning"


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"RUN_DIR=.*missing was not found"):
        read_run(tmp_path / "missing")
    (tmp_path / "logs").mkdir()
    with pytest.raises(UserError, match=r"none of config\.yaml, metrics\.jsonl and summary\.json"):
        read_run(tmp_path)


def test_half_written_files_are_read_as_far_as_possible(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=6)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[:-40] + "\n[1, 2]\nnull\n" + '{"step": "x"}\n')
    (run / "summary.json").write_text('{"status": "do')
    (run / "config.yaml").write_text("a: [1")
    data = read_run(run)
    assert data.steps == [1, 2, 3, 4, 5]
    assert [p.partition(" ")[0] for p in data.problems] == ["summary.json", "config.yaml", "4"]
    assert "half-written" in data.problems[2]
    assert data.verdict[0] == "The run has no summary yet after step 5."


def test_lines_and_alarms_of_another_form_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=6)
    wrong = [
        '{"step": 1e400}',
        '{"step": NaN}',
        '{"step": true}',
        "[" * 100_000,
        '{"step": 7, "a": "' + "y" * 1_000_000,
    ]
    huge = '{"step": 7, "reward/mean": 1' + "0" * 400 + "}"
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + "\n".join([*wrong, huge]))
    spans = ('{"step": 1, "hosts": {}, "ranks": 3}', '{"step": 2, "hosts": {}, "ranks": {"0": [["rollout"]]}}',
             '{"step": 3, "ranks": {}}', '{"step": "x", "hosts": {}, "ranks": {}}', "3")  # fmt: skip
    with (run / "timeline.jsonl").open("a") as file:
        file.write("\n".join(spans))
    summary = json.loads((run / "summary.json").read_text()) | {"alarms": [1, {"name": "slow rank"}], "eval_before": 3}
    (run / "summary.json").write_text(json.dumps(summary))
    data = read_run(run)
    assert data.problems == [f"{len(wrong)} line(s) of metrics.jsonl cannot be read; the last one may be half-written"]
    assert (data.steps, data.curves["reward/mean"][-1]) == ([1, 2, 3, 4, 5, 6, 7], None)
    assert [line["step"] for line in data.timeline] == [1, 2, 3, 4, 5, 6]
    assert data.alarms == []


def test_a_run_that_was_killed_or_is_being_written_has_a_verdict_from_its_metrics(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=40)
    (run / "summary.json").unlink()
    data = read_run(run)
    assert data.verdict[0] == "The run has no summary yet after step 40."
    assert data.verdict[1].startswith("It learned: mean reward 0.4")
    numbers = {"reward_mean": 0.3, "length_mean": 20.0, "num_prompts": 100}
    running = {"status": "interrupted", "steps": 40, "eval_before": {"accuracy": 0.3, **numbers}}
    (run / "summary.json").write_text(json.dumps(running))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, "eval/accuracy": 0.8}) + "\n")
    assert read_run(run).verdict[1] == "It learned: held-out accuracy 0.300 -> 0.800."
    (run / "metrics.jsonl").write_text("".join(json.dumps(metrics_line(s)) + "\n" for s in range(1, 41)))
    (run / "summary.json").write_text(json.dumps({"status": "interrupted", "steps": 40}))
    assert read_run(run).verdict[0] == "The run is running or was killed after step 40."
    stopped = {"status": "interrupted", "steps": 40, "error": "Stopped: stopped after step 40"}
    (run / "summary.json").write_text(json.dumps(stopped))
    assert read_run(run).verdict[0] == "The run was stopped after step 40."
    (run / "summary.json").write_text(json.dumps({"status": "failed", "steps": 40, "error": "OSError: disk full"}))
    assert read_run(run).verdict[0] == "The run failed after step 40: OSError: disk full."


def test_an_older_version_has_fewer_files_and_unknown_metrics_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=6)
    (run / "timeline.jsonl").unlink()
    lines = [metrics_line(s) | {"old/metric": float(s)} for s in range(1, 7)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.yaml").write_text("removed_section: {key: 1}\ntrain: {steps: 6}\n")
    data = read_run(run)
    assert data.timeline == []
    assert data.charts()[-1]["section"] == "other"
    assert (data.config["removed_section.key"], data.defaults["removed_section.key"]) == ("1", "")


def test_alarms_come_from_the_metrics_where_the_summary_has_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20)
    lines = [metrics_line(s) | {"train/kl": 50.0 if s > 10 else 0.1} for s in range(1, 21)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(a["name"], a["since"]) for a in read_run(run).alarms] == [("far from the reference", 11)]


def test_a_step_that_was_made_again_counts_once_and_a_long_run_is_thinned(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1)
    steps = [*range(1, 2 * MAX_POINTS + 2), 7]
    lines = [metrics_line(s) | {"reward/mean": 0.75 if i == len(steps) - 1 else 0.5} for i, s in enumerate(steps)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    timeline = [{"step": s, "ranks": {}, "hosts": {}, "started": 0.0} for s in steps]
    (run / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timeline))
    data = read_run(run)
    assert len(data.steps) <= MAX_POINTS + 1
    assert (data.steps[0], data.steps[-1]) == (1, 2 * MAX_POINTS + 1)
    assert data.curves["reward/mean"][data.steps.index(7)] == 0.75
    assert len(data.timeline) <= MAX_TIMELINE_STEPS
    assert data.timeline[-1]["step"] == 2 * MAX_POINTS + 1
    assert any("one of 3 steps" in p for p in data.problems)
