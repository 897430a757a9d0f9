"""Supervise the ranks of one machine: start them, forward signals, and end all when one fails.

torchrun is not used: it turns every failure into exit code 1 with its own traceback, and its TORCHELASTIC_* variables
make an engine's child processes wait for a store that does not exist. Invariants, each with a test in
tests/unit/launch/test_main.py: the exit code is that of the rank that failed first, even on another machine; the last
lines of that rank are the last ones on the screen; no rank outlives this process; a stop request
(grpo_mega/parallel/stop_signal.py) is forwarded to every rank and ends none, and a second Ctrl-C ends all at once.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from grpo_mega.launch.flight_records import flight_environment
from grpo_mega.launch.rank_processes import RankExit, RankProcesses
from grpo_mega.launch.rendezvous import Rendezvous
from grpo_mega.launch.run_temporaries import run_environment, run_temporaries
from grpo_mega.launch.stall_agreement import StallAgreement
from grpo_mega.launch.stall_watch import StallLimits, StallWatch
from grpo_mega.parallel.heartbeat import FOLDER_VARIABLE, make_heartbeats
from grpo_mega.parallel.stop_signal import EXIT_CODE, STOPPED_EXIT_CODES, TERMINATED_EXIT_CODE, expect_stop

_STOPPING_SECONDS = 60.0  # from the first rank that exits after a stop request to the last one
_REASON_SECONDS = 5.0  # from the exit of a rank without a message to the message of another rank
_MAX_TAIL_CHARACTERS = 20000  # of the text that is sent to other machines


def exit_code_of(return_code: int) -> int:
    """Map a return code to an exit code: 0, 2 (wrong input), 130 and 143 (stopped) stay; all others become 1."""
    return return_code if return_code in (0, 2, *STOPPED_EXIT_CODES) else 1


def _report(ranks: RankProcesses, failed: int, return_code: int, *, cause_is_last: bool) -> str:
    """Print the failed rank's last lines as the last text on the screen. Return them for the other machines.

    Args:
        ranks: of this machine.
        failed: local number of the rank.
        return_code: of its process.
        cause_is_last: the signal that ended it is the last line on the screen, and is not printed again.
    """
    tail = [line.decode(errors="replace") for line in ranks.screen.tails[failed]]
    cause: list[str] = []
    if return_code < 0:
        cause.append(_signal_line(ranks.names[failed], return_code))
    elif not tail:
        cause.append(f"launch: rank {ranks.names[failed]} ended with exit code {return_code} and no message")
    shown = cause
    if ranks.screen.last_writer != failed and tail:
        shown = [f"launch: the last lines of rank {ranks.names[failed]}, which failed first:", *tail, *cause]
    if not cause_is_last or shown is not cause:
        _show("".join(f"{line}\n" for line in shown))
    heading = f"launch: the last lines of rank {ranks.names[failed]} on {socket.gethostname()}, which failed first:"
    return "".join(f"{line}\n" for line in [heading, *tail, *cause])[-_MAX_TAIL_CHARACTERS:]


def _signal_line(rank: str, return_code: int) -> str:
    """Return the line that names the signal which ended a rank."""
    usual = " (the usual cause: out of memory)" if return_code == -signal.SIGKILL else ""
    return f"launch: rank {rank} was ended by {signal.Signals(-return_code).name}{usual}"


def _end_others(ranks: RankProcesses, reason: RankExit) -> str:
    """End the other ranks and print the reason of the failure as the last text. Return it for the other machines.

    The end of the ranks can take 11 s, so a signal that ended a rank is printed before it, too.
    """
    if reason.rank is None:
        ranks.terminate()
        _show(reason.text)
        return reason.text
    num_lines, is_shown = ranks.screen.num_lines, reason.code < 0
    if is_shown:
        _show(f"{_signal_line(ranks.names[reason.rank], reason.code)}\n")
    ranks.terminate()
    is_last = is_shown and ranks.screen.num_lines == num_lines
    return _report(ranks, reason.rank, reason.code, cause_is_last=is_last)


def _exit_with_reason(ranks: RankProcesses, first: RankExit) -> RankExit:
    """Return the exit whose rank wrote the reason of the failure: `first`, or the next exit with a message.

    A rank that exits without a message leaves the message to another rank that has the same error. If no rank here
    writes one within 5 s, and no other machine reports a failure, the result is `first`.
    """
    exited, deadline = first, time.monotonic() + _REASON_SECONDS
    while exited.rank is not None:
        ranks.readers[exited.rank].join(timeout=0.5)  # before the lines of the ranks that it makes fail
        if exited.code < 0 or (exited.code not in (0, *STOPPED_EXIT_CODES) and ranks.screen.tails[exited.rank]):
            return exited
        try:
            exited = ranks.exits.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return first
    return exited


def _show(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def run_ranks(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    meeting: Rendezvous | None = None,
    limits: StallLimits | None = None,
) -> int:
    """Run `command` once per environment and wait for all ranks. The first failure ends the others.

    Args:
        command: that starts a rank.
        environments: one per rank of this machine.
        meeting: rendezvous with the other machines, if any; a failure there ends the ranks of this machine.
        limits: of the phases of a rank without progress; None: ranks are not watched.

    Returns:
        0 if every rank returned 0; after a stop request 143 for SIGTERM and 130 for all others; else the exit code of
        the rank that failed first (`exit_code_of`).
    """
    received: list[int] = []
    ranks: RankProcesses | None = None

    def forward_signal(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if ranks is not None:
            if len(received) == 1:
                ranks.request(_request_of(number))
            else:
                ranks.send(signal.SIGKILL)

    expect_stop()
    previous = {
        number: signal.signal(number, forward_signal) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        with run_temporaries() as folder:
            make_heartbeats(folder, len(environments))
            shared = {**run_environment(folder), **flight_environment(folder, os.environ), FOLDER_VARIABLE: str(folder)}
            ranks = RankProcesses(command, [{**env, **shared} for env in environments])
            if received:  # while the ranks were started
                ranks.request(_request_of(received[0]))
            agreement = None if limits is None else _agreement(ranks, folder, limits, meeting)
            if meeting is not None:
                on_message = (lambda *_: None) if agreement is None else agreement.receive
                meeting.watch(lambda code, text: ranks.exits.put(RankExit(None, code, text)), on_message)
            return _wait_for_all(ranks, received, meeting, agreement)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _agreement(ranks: RankProcesses, folder: Path, limits: StallLimits, meeting: Rendezvous | None) -> StallAgreement:
    numbers = [int(name) for name in ranks.names]
    watch = StallWatch(folder, [process.pid for process in ranks.processes], numbers, limits)
    return StallAgreement(watch, folder, meeting, is_first=0 in numbers)


def _wait_for_all(
    ranks: RankProcesses, received: Sequence[int], meeting: Rendezvous | None, agreement: StallAgreement | None
) -> int:
    find_stall = (lambda: None) if agreement is None else agreement.check
    stopped = 0
    for _ in ranks.processes:
        exited = ranks.next_exit(_STOPPING_SECONDS if stopped else None, find_stall)
        if exited is None:  # the first ranks had left before training started, and the others wait for them
            ranks.terminate()
            break
        if exited.is_stall:
            ranks.kill()
            _show(exited.text)
            if meeting is not None:
                meeting.report_failure(exited.code, exited.text[-_MAX_TAIL_CHARACTERS:])
            return exited.code
        if exited.rank is None:
            ranks.terminate()
            _show(exited.text)
            return exited.code
        if exited.code in STOPPED_EXIT_CODES:  # all ranks agreed to stop: the others exit soon
            stopped = max(stopped, exited.code)
        elif exited.code != 0:
            by_signal = len(received) > 1 or (received and -exited.code == _request_of(received[0]))
            reason = exited if by_signal else _exit_with_reason(ranks, exited)
            if by_signal:
                code, text = _stopped_code(received), f"launch: interrupted on {socket.gethostname()}\n"
                ranks.terminate()
                _show(text)
            else:
                code, text = exit_code_of(exited.code), _end_others(ranks, reason)
            if meeting is not None:
                meeting.report_failure(code, text)
            return code
    for reader in ranks.readers:
        reader.join(timeout=1.0)
    return _stopped_code(received) if stopped and received else stopped


def _request_of(number: int) -> int:
    """Return the signal for the ranks: a closed terminal (SIGHUP) is a request to terminate."""
    return signal.SIGTERM if number == signal.SIGHUP else number


def _stopped_code(received: Sequence[int]) -> int:
    return EXIT_CODE if _request_of(received[0]) == signal.SIGINT else TERMINATED_EXIT_CODE
