"""The report of a stalled job: the ranks that wait, the rank that they wait for, and the stacks of all.

A rank waits if the top of its main thread's stack is in a collective or in a wait for another rank. The others wait for
the ranks with a stopped process; else for those that wait for a background thread of their own; else for those that do
not wait; else for those that are least far.
Imports no torch. Asserted by tests/unit/launch/test_stall_report.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from grpo_mega.launch import processes
from grpo_mega.launch.stall_watch import RankStatus
from grpo_mega.parallel.heartbeat import OTHER_RANKS, STACKS_SIGNAL, stacks_file

_STACK_SECONDS = 1.5
_PY_SPY_SECONDS = 3.0
_TOP_FRAMES = 8
_WAITING = (
    "/torch/distributed/",
    "/grpo_mega/parallel/peer_group",
    "/grpo_mega/weight_sync/transports/",
    "/megatron/core/pipeline_parallel/p2p_communication",
)
_MAX_STACK_LINES = 60  # of a process
_SHOWN_RANKS = 16

Stacks = Mapping[int, str]
"""Process -> Python stacks of all its threads, or the reason why there are none."""


def collect_stacks(folder: Path, pids: Sequence[int]) -> dict[int, str]:
    """Return the Python stacks of processes of this machine. Takes at most five seconds."""
    asked = [pid for pid in pids if processes.state(pid) not in "TtZX" and processes.catches(pid, STACKS_SIGNAL)]
    asked = [pid for pid in asked if stacks_file(folder, pid).exists()]
    for pid in asked:
        with suppress(ProcessLookupError):
            os.kill(pid, STACKS_SIGNAL)
    deadline = time.monotonic() + _STACK_SECONDS
    while time.monotonic() < deadline and not all(stacks_file(folder, pid).stat().st_size for pid in asked):
        time.sleep(0.05)
    time.sleep(0.1)  # for the rest of a file that is being written
    py_spy = shutil.which("py-spy")
    return {pid: _stack(folder, pid, pid in asked, py_spy) for pid in pids}


def _stack(folder: Path, pid: int, was_asked: bool, py_spy: str | None) -> str:
    state = processes.state(pid)
    text = stacks_file(folder, pid).read_text(encoding="utf-8", errors="replace") if was_asked else ""
    if not text and py_spy is not None and state not in "ZX":
        with suppress(subprocess.SubprocessError, OSError):
            command = [py_spy, "dump", "--nonblocking", "--pid", str(pid)]
            found = subprocess.run(command, capture_output=True, text=True, timeout=_PY_SPY_SECONDS, check=True)
            text = found.stdout
    if text:
        return "\n".join(text.splitlines()[-_MAX_STACK_LINES:])
    if state in "Tt":
        return f"no stacks: the process is stopped (state {state}: SIGSTOP, or a debugger)"
    if state in "ZX":
        return "no stacks: the process has exited"
    return f"no stacks: the process did not answer {STACKS_SIGNAL.name} (state {state}), and py-spy gave none"


def is_waiting(stacks: str) -> bool:
    """Return True if the main thread, the last one that faulthandler lists, waits for another rank."""
    main = stacks.split("\n\n")[-1].splitlines()
    frames = [line for line in main if line.lstrip().startswith("File ")][:_TOP_FRAMES]
    return any(part in frame for frame in frames for part in _WAITING)


def awaited_ranks(ranks: Sequence[RankStatus], stacks: Mapping[int, str]) -> list[RankStatus]:
    """Return the ranks for which the others wait. `stacks`: rank -> stacks of its process."""
    stopped = [each for each in ranks if each.stopped]
    if stopped:
        return stopped
    if own := [each for each in ranks if each.awaited not in ("", OTHER_RANKS)]:
        return own
    busy = [each for each in ranks if not is_waiting(stacks.get(each.rank, ""))]
    if 0 < len(busy) < len(ranks):
        return busy
    least = min((each.step, each.collectives) for each in ranks)
    return [each for each in ranks if (each.step, each.collectives) == least]


def describe(rank: RankStatus) -> str:
    """Return one line about a rank."""
    state = f"; it waits for {rank.awaited}" if rank.awaited else ""
    if rank.stopped:
        which = "its process" if rank.pid in rank.stopped else f"process {rank.stopped[0]} of its engine"
        state = f"; {which} is stopped (SIGSTOP, or a debugger)"
    return (
        f"rank {rank.rank} (process {rank.pid} on {rank.host}): no progress for {rank.idle_seconds:.0f} s in phase "
        f"{rank.phase}, step {rank.step} of this start, {rank.collectives} collectives{state}"
    )


def make_report(ranks: Sequence[RankStatus], stacks: Mapping[int, str], silent: Sequence[str] = ()) -> str:
    """Return the text of the report; its last lines name the ranks.

    Args:
        ranks: of all machines.
        stacks: rank -> stacks of its process and of its engine.
        silent: machines whose launcher does not respond.
    """
    awaited = awaited_ranks(ranks, stacks) if ranks else []
    numbers = {each.rank for each in awaited}
    waiting = [each for each in ranks if each.rank not in numbers]
    shown = [*awaited[:_SHOWN_RANKS], *waiting[:_SHOWN_RANKS]]
    lines = []
    for each in reversed(shown):
        lines += [f"launch: stacks of rank {each.rank}:", stacks.get(each.rank, "no stacks were received"), ""]
    limits = [each for each in ranks if each.is_late]
    lines += [f"launch: {describe(each)}" for each in shown]
    lines += [f"launch: {len(ranks) - len(shown)} more ranks"] if len(ranks) > len(shown) else []
    lines += [f"launch: the launcher of {machine} does not respond" for machine in silent]
    names = ", ".join(str(each.rank) for each in awaited) or "(none known)"
    others = ", ".join(str(each.rank) for each in waiting) or "no other rank"
    late = max(limits, key=lambda each: each.idle_seconds - each.limit_seconds, default=None)
    limit = f" (limit of phase {late.phase}: {late.limit_seconds:g} s; guard.phase_limits)" if late is not None else ""
    lines.append(f"launch: the job has stalled{limit}: rank {names} makes no progress; waiting for it: {others}")
    return "\n".join(lines) + "\n"
