"""grpo-mega rollouts: folders of running, killed, damaged, empty and older runs, and what is printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mega.cli.main import main
from tests.helpers.jobs import REPOSITORY
from tests.helpers.step_columns import DEFAULTS, write_step

STEP_12 = (
    [{"group": 0, "reward": 0.0, "completion": "\x1b[31mwrong\x1b[0m"}, {"group": 0, "member": 1}],
    [{"group": 1, "reward": None, "reward_failures": ["judge"], "advantage": float("nan")}],
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("run: {}\n")
    return tmp_path


def test_the_readable_form_escapes_what_a_terminal_executes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_step(run, 12, *STEP_12)
    assert main(["rollouts", str(run), "--step", "12", "--width", "80"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    first, second, third = out.split("\n\n")
    assert first.splitlines()[0].startswith("step 12, group 0, member 0: reward 0,")
    assert first.splitlines()[1] == f"{'12+34=':<38} | \\x1b[31mwrong\\x1b[0m"
    assert second.splitlines()[1] == f"{'12+34=':<38} | 46"
    assert "group 1, member 0: reward none, exact 1, judge failed" in third


def test_jsonl_has_an_object_per_rollout_with_every_column(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_step(run, 12, *STEP_12)
    assert main(["rollouts", str(run), "--step", "12", "--jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == DEFAULTS | {"step": 12, "member": 1}
    assert [(row["group"], row["member"], row["reward"], row["advantage"]) for row in rows] == [
        (0, 0, 0.0, 0.5),
        (0, 1, 1.0, 0.5),
        (1, 0, None, None),
    ]


def test_a_condition_selects_and_the_last_step_is_the_default(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_step(run, 3, [{}])
    write_step(run, 12, *STEP_12)
    (run / "rollouts" / "step_000013").mkdir()  # the step that is being written
    (run / "rollouts" / "step_000013" / "part-00000.parquet.tmp").write_bytes(b"PAR1")
    assert main(["rollouts", str(run), "--where", "reward < 0.5", "--jsonl"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["step"], row["group"]) == (12, 0)
    assert main(["rollouts", str(run), "--where", "reward > 5"]) == 0
    assert capsys.readouterr().out == "none of 3 rollouts\n"


def test_a_damaged_part_is_named_and_the_others_are_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_step(run, 12, *STEP_12)
    (folder / "part-00000.parquet").write_bytes(b"PAR1 but not more")
    assert main(["rollouts", str(run), "--step", "12", "--jsonl"]) == 1
    printed = capsys.readouterr()
    assert [json.loads(line)["group"] for line in printed.out.splitlines()] == [1]
    assert printed.err.startswith(f"error: {folder / 'part-00000.parquet'} is damaged (")
    (folder / "part-00000.parquet").unlink()
    assert main(["rollouts", str(run), "--step", "12", "--jsonl"]) == 1
    assert "part-00000.parquet is missing: the step has 2 parts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "4"], "--step=4: .* has no rollouts of this step; use one of 2-3, 12$"),
        (["--where", "rewrd<1"], r"--where=rewrd<1: 'rewrd' is not a column; did you mean reward\?$"),
        (["--step", "12", "--where", "reward<"], "--where=reward<: it ends where a column or a value is needed"),
    ],
)
def test_wrong_arguments_are_errors_of_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    for step in (2, 3, 12):
        write_step(run, step, [{}])
    assert main(["rollouts", str(run), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert line.startswith("error: ")


def test_folders_without_rollouts_say_why(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert main(["rollouts", *arguments]) == 2
        return capsys.readouterr().err

    assert "is not the folder of a run (it has no config.yaml)" in error(str(run / "nowhere"))
    assert "has no rollouts yet" in error(str(run))
    (run / "rollouts").mkdir()
    assert "has no rollouts yet" in error(str(run), "--step", "1")
    (run / "rollouts" / "step_000002.jsonl").write_text("{}\n")
    assert "step_000002.jsonl was written by an older version" in error(str(run))
    write_step(run, 3, [{}])
    assert "step_000002.jsonl was written by an older version" in error(str(run), "--step", "2")


def test_a_reader_may_close_the_pipe(run: Path) -> None:
    write_step(run, 1, [{"completion_ids": [0] * 2000, "sampler_log_probs": [0.0] * 2000, "old_log_probs": None}] * 60)
    command = f"{sys.executable} -m grpo_mega.cli.main rollouts {run} --jsonl | head -c 100"
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
