"""docs/faults.md: its commands are those that the launcher and `grpo-mega chaos` accept.

tests/e2e/test_chaos.py disturbs real runs; tests/unit/launch/test_restarts.py starts failed ones again.
"""

from __future__ import annotations

import shlex

from grpo_mega.cli.chaos_cases import SCENARIOS
from grpo_mega.cli.main import COMMANDS
from grpo_mega.config.load import load_config
from grpo_mega.launch.restarts import take_restarts
from tests.helpers.guides import shell_blocks
from tests.helpers.jobs import REPOSITORY

RESTARTED, CHAOS = (shlex.split(block) for block in shell_blocks("faults.md"))


def test_the_restarted_command_has_a_config_and_a_number_of_restarts() -> None:
    program, config, *rest = RESTARTED
    restarts, overrides = take_restarts(rest)
    assert (program, restarts) == ("launch/train.sh", 2)
    assert load_config(REPOSITORY / config, overrides).train.steps == 4


def test_the_disturbed_runs_are_those_of_a_scenario() -> None:
    program, tool, *options = CHAOS
    assert program == "grpo-mega"
    assert tool in COMMANDS
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert set(given) == {"--number", "--seed", "--only"}
    assert any(given["--only"] in scenario.name for scenario in SCENARIOS)
