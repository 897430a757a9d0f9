"""docs/faults.md: its commands are those that the launcher, `grpo-mega replay` and `grpo-mega chaos` accept.

tests/e2e/test_chaos.py disturbs real runs; tests/unit/launch/test_restarts.py starts failed ones again.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from grpo_mega.cli.chaos_cases import SCENARIOS
from grpo_mega.cli.main import COMMANDS, main
from grpo_mega.config.load import load_config
from grpo_mega.launch.restarts import take_restarts
from tests.helpers.guides import shell_blocks
from tests.helpers.jobs import REPOSITORY

RESTART_BLOCK, REPLAY_BLOCK, CHAOS_BLOCK, SOAK_BLOCK = shell_blocks("faults.md")
RESTARTED, CHAOS, SOAK = (shlex.split(block) for block in (RESTART_BLOCK, CHAOS_BLOCK, SOAK_BLOCK))


def test_the_restarted_command_has_a_config_and_a_number_of_restarts() -> None:
    program, config, *rest = RESTARTED
    restarts, overrides = take_restarts(rest)
    assert (program, restarts) == ("launch/train.sh", 2)
    assert load_config(REPOSITORY / config, overrides).train.steps == 4


@pytest.mark.parametrize("line", REPLAY_BLOCK.strip().splitlines())
def test_the_replay_commands_are_accepted_up_to_the_run_folder(
    line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(line)
    assert program == "grpo-mega"
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("error: RUN_DIR=RUN_DIR has no config.yaml")


def test_the_disturbed_runs_are_those_of_a_scenario() -> None:
    program, tool, *options = CHAOS
    assert program == "grpo-mega"
    assert tool in COMMANDS
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert set(given) == {"--number", "--seed", "--only"}
    assert any(given["--only"] in scenario.name for scenario in SCENARIOS)


def test_the_long_run_is_compared_by_a_tool_with_these_options() -> None:
    program, tool, *options = SOAK
    assert (program, tool) == ("launch/tool.sh", "bench_soak")
    assert not set(options[::2]) - {"--steps", "--early"}
