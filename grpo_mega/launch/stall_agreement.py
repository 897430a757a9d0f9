"""The launchers of a job agree that it has stalled, over their own connections (rendezvous.py).

Each launcher sends the statuses of its ranks to machine 0 once a second. Machine 0 decides with those of all machines,
requests the stacks of all, and makes the report. A launcher that sends nothing for a minute is reported too: its
machine may be frozen. Machine 0 sends heartbeats, so that the others notice if machine 0 is the one.
Imports no torch. Asserted by tests/unit/launch/test_stall_agreement.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_mega.launch.flight_records import last_collectives, request_dumps
from grpo_mega.launch.rendezvous import NodeInfo, Rendezvous
from grpo_mega.launch.stall_report import collect_stacks, make_report
from grpo_mega.launch.stall_watch import LEAST_SECONDS, RankStatus, StallWatch, has_stalled

_SEND_SECONDS = 1.0
_STACKS_SECONDS = 6.0  # from the request for stacks to the report
_MAX_STACK_CHARACTERS = 400_000  # of the ranks of a machine in one message


class StallAgreement:
    """This machine's part. Messages arrive in other threads; `check` runs in the launcher's loop."""

    def __init__(
        self,
        watch: StallWatch,
        folder: Path,
        meeting: Rendezvous | None,
        *,
        is_first: bool,
        silence_seconds: float = LEAST_SECONDS,
    ) -> None:
        """Create it before messages arrive.

        Args:
            watch: of the ranks of this machine.
            folder: holds the heartbeats and the stacks.
            meeting: connections to the other machines, if there are any.
            is_first: True on machine 0.
            silence_seconds: a launcher without a message for this long does not respond.
        """
        self._watch, self._folder, self._meeting, self._is_first = watch, folder, meeting, is_first
        self._silence = silence_seconds
        now = time.monotonic()
        others = [] if meeting is None else meeting.machines
        self._lock = threading.Lock()
        self._last_message = dict.fromkeys(others, now)
        self._statuses: dict[NodeInfo, list[RankStatus]] = {}
        self._stacks: dict[int, str] = {}
        self._answered: set[NodeInfo] = set()
        self._sent = 0.0
        self._mine: list[RankStatus] = []

    def receive(self, machine: NodeInfo, message: Mapping[str, Any]) -> None:
        """Take a message of another machine."""
        with self._lock:
            self._last_message[machine] = time.monotonic()
            if "done" in message:  # its ranks have succeeded
                self._last_message.pop(machine, None)
                self._statuses.pop(machine, None)
                return
        if "statuses" in message:
            found = [RankStatus.from_json(each) for each in message["statuses"]]
            with self._lock:
                self._statuses[machine] = found
        elif "stacks" in message:
            with self._lock:
                self._stacks |= {int(rank): str(text) for rank, text in message["stacks"].items()}
                self._answered.add(machine)
        elif "request_stacks" in message:
            self._send({"stacks": self._own_stacks()})

    def check(self) -> str | None:
        """Return the report if the job has stalled, else None. Cheap: it looks twice a second."""
        if not self._watch.is_due():
            return None
        self._mine = self._watch.statuses()
        now = time.monotonic()
        if self._meeting is not None and now - self._sent >= _SEND_SECONDS:
            self._sent = now
            own = [] if self._is_first else [each.to_json() for each in self._mine]
            self._send({"alive": True} if self._is_first else {"statuses": own})
        with self._lock:
            silent = [machine for machine, moment in self._last_message.items() if now - moment > self._silence]
            ranks = [*self._mine, *(each for found in self._statuses.values() for each in found)]
            if self._is_first and not silent and self._last_message.keys() - self._statuses.keys():
                return None  # the statuses of a machine are not known yet
        if self._is_first:
            return self._report(silent) if silent or has_stalled(ranks) else None
        return make_report(self._mine, self._own_stacks(), [str(each) for each in silent]) if silent else None

    def _report(self, silent: list[NodeInfo]) -> str:
        """Request the stacks of all machines, and make the report, on machine 0."""
        self._send({"request_stacks": True})
        stacks = self._own_stacks()
        deadline = time.monotonic() + _STACKS_SECONDS
        while time.monotonic() < deadline:
            with self._lock:
                if self._answered | set(silent) >= set(self._last_message):
                    break
            time.sleep(0.05)
        with self._lock:
            ranks = [*self._mine, *(each for found in self._statuses.values() for each in found)]
            stacks |= self._stacks
        return make_report(sorted(ranks, key=lambda each: each.rank), stacks, [str(each) for each in silent])

    def _own_stacks(self) -> dict[int, str]:
        """Return rank -> stacks of its process, after those of its engine, and its last collective if NCCL has one."""
        mine = self._mine or self._watch.statuses()
        numbers, begin = [each.rank for each in mine], time.monotonic()
        asked = request_dumps(self._folder, numbers)
        found = collect_stacks(self._folder, [pid for each in mine for pid in (each.pid, *each.engines)])
        collectives = last_collectives(self._folder, numbers, asked, begin)
        for each in mine:
            if each.rank in collectives:
                found[each.pid] += f"\n{collectives[each.rank]}"
        limit = _MAX_STACK_CHARACTERS // max(1, len(mine))
        return {
            each.rank: "\n\n".join(
                [*(f"process {pid} of its engine:\n{found[pid]}" for pid in each.engines), found[each.pid]]
            )[-limit:]
            for each in mine
        }

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._meeting is not None:
            self._meeting.send(message)
