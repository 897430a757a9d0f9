"""grpo_mega.observe.alarm_command: the command receives the alarm; its failures are log lines."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from grpo_mega.observe.alarm_command import AlarmCommand
from grpo_mega.observe.alarms import Alarm

ALARM = Alarm("truncated answers", 3, None, 0.75, 0.5, 'with "quotes" and $HOME', "rollouts")


def test_the_command_receives_the_alarm_as_json(tmp_path: Path) -> None:
    command = AlarmCommand(f"cat >> {tmp_path / 'alarms'}")
    command.start(ALARM)
    command.close()
    found = json.loads((tmp_path / "alarms").read_text())
    assert (found["name"], found["since"], found["text"]) == ("truncated answers", 3, 'with "quotes" and $HOME')


@pytest.mark.parametrize(
    ("command", "words"), [("echo broken >&2; exit 3", "exit code 3 (broken)"), ("sleep 60", "ended after 0.2 s")]
)
def test_a_command_that_fails_or_hangs_is_named(caplog: pytest.LogCaptureFixture, command: str, words: str) -> None:
    alarm_command = AlarmCommand(command, limit_seconds=0.2 if "sleep" in command else 60)
    with caplog.at_level(logging.WARNING):
        alarm_command.start(ALARM)
        alarm_command.close()
    assert words in caplog.text
    assert "observe.alarm_command" in caplog.text
