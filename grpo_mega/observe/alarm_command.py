"""Starts the command of `observe.alarm_command` for an alarm, in the background. Its failure is a line in the log."""

from __future__ import annotations

import json
import logging
import subprocess
import threading
from dataclasses import asdict

from grpo_mega.observe.alarms import Alarm

_LIMIT_SECONDS = 60.0
log = logging.getLogger(__name__)


class AlarmCommand:
    """Runs one command for each alarm."""

    def __init__(self, command: str, limit_seconds: float = _LIMIT_SECONDS) -> None:
        """`command`: for the shell; it finds the alarm as one line of JSON on its standard input."""
        self._command, self._limit = command, limit_seconds
        self._threads: list[threading.Thread] = []

    def start(self, alarm: Alarm) -> None:
        """Start the command, and do not wait for it."""
        thread = threading.Thread(target=self._run, args=(json.dumps(asdict(alarm)) + "\n",), daemon=True)
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        """Wait for the commands."""
        for thread in self._threads:
            thread.join(self._limit + 1)

    def _run(self, line: str) -> None:
        with subprocess.Popen(  # noqa: S602 - a command line of the config, which is trusted; the alarm is its input
            self._command,
            shell=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        ) as process:
            try:
                _, errors = process.communicate(line, timeout=self._limit)
            except subprocess.TimeoutExpired:
                process.kill()
                log.warning("observe.alarm_command=%s: ended after %g s", self._command, self._limit)
                return
        if process.returncode:
            last = (errors.strip().splitlines() or ["no message"])[-1]
            log.warning("observe.alarm_command=%s: exit code %d (%s)", self._command, process.returncode, last)
