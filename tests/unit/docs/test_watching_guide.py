"""docs/watching.md: its commands run on folders of runs, and a training command has a valid config."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from grpo_mega.cli import report, trace, watch
from grpo_mega.config.load import load_config
from grpo_mega.config.shipped import find_config
from grpo_mega.observe.trace.recorder import TraceRecorder
from tests.helpers.guides import shell_blocks
from tests.helpers.reported_runs import write_run

TOOLS = {"report": report.main, "trace": trace.main, "watch": watch.main}
COMMANDS = [
    shlex.split(line, comments=True) for block in shell_blocks("watching.md") for line in block.splitlines() if line
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_ends_with_0(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("quickstart", "first", "second"):
        write_run(tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    program, tool, *arguments = command
    if program == "launch/train.sh":
        assert load_config(find_config(Path(tool)), arguments).observe.trackers == ("tensorboard", "wandb", "mlflow")
        return
    assert program == "grpo-mega"
    if tool == "trace":
        recorder = TraceRecorder(tmp_path / arguments[0] / "trace" / "rank-00000.jsonl", "rank 0")
        recorder.set_clock(0, 0)
        recorder.close()
    assert TOOLS[tool](arguments) == 0
    if tool == "report":
        assert (Path(arguments[0]) / "report.html").is_file()
