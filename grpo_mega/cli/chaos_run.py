"""Runs the cases of `grpo-mega chaos`: starts a training run, sends the signal, starts it again, and compares.

A run is started by the same command until it succeeds, as an operator or a scheduler would do. Its result must equal
that of the undisturbed run, bit for bit, and nothing may be left of it. Asserted by tests/unit/cli/test_chaos.py and
tests/e2e/test_chaos.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from grpo_mega.cli.chaos_cases import ChaosCase, Scenario
from grpo_mega.cli.prompt_use import read_prompt_use
from grpo_mega.parallel.ports import free_port
from grpo_mega.parallel.shared_memory import SHARED_MEMORY

_STARTS = 5
_RUN_SECONDS = 600.0
_CLEAN_SECONDS = 15.0
_CONTINUE_SECONDS = 3.0  # after a SIGSTOP of a process whose stop ends nothing
_POLL_SECONDS = 0.02
_PHASES = ("rollout", "reward", "log_probs", "train", "sync", "checkpoint")
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "NNODES", "NODE_RANK", "TORCHELASTIC_")
_TIMED = (
    "time/",
    "throughput/",
    "engine/",
    "sync/gb_per_second",
    "sync/verify_seconds",
    "memory/",
    "host/",
    "gpu/",
    "rank/",
    "wall_time",
)
_TIMED_PARTS = ("_seconds", "last_answers", "bubble_fraction")


@dataclass(frozen=True)
class ChaosOutcome:
    """Result of a case. `problems` is empty if the run ended as the undisturbed one and left nothing behind."""

    case: ChaosCase
    starts: int
    was_hit: bool
    seconds: float
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Undisturbed:
    """Result and times of the undisturbed run of a scenario: seconds until its first step, and until its end."""

    folder: Path
    first_step_seconds: float
    seconds: float


class ChaosRuns:
    """Runs cases in a work folder. Temporary files of the runs are in its folder `t`."""

    def __init__(self, config: str, work: Path, stall_seconds: float) -> None:
        """Use `config` (CONFIG of the train command) and the folder `work`, which exists.

        Args:
            config: a file, or the name of a shipped config.
            work: for the run folders and the output of the commands.
            stall_seconds: `guard.phase_limits` of every phase; the start has four times as much.
        """
        self._config, self._work, self._stall_seconds = config, work, stall_seconds
        self._temporary = work / "t"
        self._temporary.mkdir(exist_ok=True)
        self._undisturbed: dict[str, Undisturbed] = {}

    def undisturbed(self, scenario: Scenario) -> Undisturbed:
        """Return the undisturbed run of a scenario, which is made once.

        Raises:
            RuntimeError: it failed (with the end of its output).
        """
        if scenario.name not in self._undisturbed:
            folder = self._work / f"expected_{scenario.name.replace(' ', '_')}"
            begin = time.monotonic()
            with self._started(scenario, folder, "expected") as run:
                first = _wait_for_first_step(run.launcher, folder)
                code = run.launcher.wait(_RUN_SECONDS)
            if code != 0:
                raise RuntimeError(f"{scenario.name}: the undisturbed run ended with {code}:\n{run.output[-3000:]}")
            self._undisturbed[scenario.name] = Undisturbed(folder, first - begin, time.monotonic() - begin)
        return self._undisturbed[scenario.name]

    def run(self, case: ChaosCase) -> ChaosOutcome:
        """Run a case: disturb the first start, and start again until the run is complete."""
        expected = self.undisturbed(case.scenario)
        folder = self._work / f"case_{case.index}"
        shared_memory = set(os.listdir(SHARED_MEMORY))
        begin, was_hit, problems = time.monotonic(), False, list[str]()
        for starts in range(1, _STARTS + 1):
            with self._started(case.scenario, folder, f"case_{case.index}_{starts}") as run:
                if not was_hit:
                    was_hit = self._disturb(run, case, expected)
                try:
                    code = run.launcher.wait(_RUN_SECONDS)
                except psutil.TimeoutExpired:
                    problems.append(f"start {starts} did not end within {_RUN_SECONDS:g} s")
                    break
            problems += [f"start {starts} left {what}" for what in self._left_behind(shared_memory)]
            if code == 0:
                is_repeatable = case.scenario.is_repeatable
                problems += differences(folder, expected.folder) if is_repeatable else use_problems(folder)
                break
            if code == 2 and case.victim != "server":  # a start whose server is gone finds it at no address
                problems.append(f"start {starts} ended with exit code 2: {run.output[-400:]}")
                break
        else:
            problems.append(f"the run was not complete after {_STARTS} starts: {run.output[-400:]}")
        return ChaosOutcome(case, starts, was_hit, time.monotonic() - begin, tuple(problems))

    def _disturb(self, run: _Run, case: ChaosCase, expected: Undisturbed) -> bool:
        """Send the signal at the moment of the case. Return False if the run or the victim ended before."""
        start = time.monotonic()
        moment = expected.seconds * case.moment
        while (victim := run.find(case)) is None or time.monotonic() - start < moment:
            if not _is_running(run.launcher):
                return False
            time.sleep(_POLL_SECONDS)
        try:
            victim.send_signal(case.signal)
            if case.signal == signal.SIGSTOP and case.victim in ("launcher", "server"):
                time.sleep(_CONTINUE_SECONDS)  # a stopped launcher ends nothing; ranks wait for a server for longer
                victim.send_signal(signal.SIGCONT)
        except psutil.NoSuchProcess:
            return False
        return True

    @contextmanager
    def _started(self, scenario: Scenario, folder: Path, name: str) -> Iterator[_Run]:
        """Start the training command, after an engine server if the scenario has one; end both on exit."""
        limits = ", ".join(f"{phase}: {self._stall_seconds:g}" for phase in _PHASES)
        arguments = [
            self._config,
            *scenario.arguments,
            f"run.dir={folder}",
            f"guard.phase_limits={{start: {4 * self._stall_seconds:g}, {limits}}}",
        ]
        with ExitStack() as stack:
            server = None
            if scenario.has_server:
                port = free_port()
                server = stack.enter_context(self._process(["serve", *arguments, f"--port={port}"], f"{name}_server"))
                arguments.append(f"engine.urls=['127.0.0.1:{port}']")
            launcher = stack.enter_context(self._process(["train", *arguments], name))
            yield _Run(launcher, server, self._work / f"{name}.log")

    @contextmanager
    def _process(self, words: list[str], name: str) -> Iterator[psutil.Popen]:
        env = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
        env |= {"TMPDIR": str(self._temporary), "OMP_NUM_THREADS": "1"}
        with (self._work / f"{name}.log").open("wb") as log:
            process = psutil.Popen(
                [sys.executable, "-m", "grpo_mega.cli.main", *words],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            kill_with_children(process)

    def _left_behind(self, shared_memory: set[str]) -> list[str]:
        """Return what is left of all runs after 15 s at the latest: processes, shared memory, temporary files."""
        deadline = time.monotonic() + _CLEAN_SECONDS
        while (left := self._leftovers(shared_memory)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def _leftovers(self, shared_memory: set[str]) -> list[str]:
        from grpo_mega.launch.processes import command_line, held_shared_memory, own_processes

        held, found = set[str](), list[str]()
        for pid in own_processes():
            held |= held_shared_memory(pid)
            with suppress(psutil.Error, OSError):
                process = psutil.Process(pid)
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.environ().get("TMPDIR", "").startswith(str(self._temporary)):
                    found.append(f"process {pid} ({command_line(pid)[:100]})")
        found += [str(SHARED_MEMORY / name) for name in sorted(set(os.listdir(SHARED_MEMORY)) - shared_memory - held)]
        return found + [str(path) for path in self._temporary.iterdir() if not path.name.startswith("torchinductor")]


@dataclass(frozen=True)
class _Run:
    """A running training command, its engine server if it has one, and its output."""

    launcher: psutil.Popen
    server: psutil.Popen | None
    log: Path

    @property
    def output(self) -> str:
        """Output of the command so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def find(self, case: ChaosCase) -> psutil.Process | None:
        """Return the process that gets the signal, or None if it does not exist yet."""
        if case.victim == "launcher":
            return self.launcher
        if case.victim == "server":
            return self.server
        with suppress(psutil.Error):
            tree = self.launcher.children(recursive=True)
            ranks = [each for each in tree if "grpo_mega.train" in each.cmdline() and "RANK" in each.environ()]
            ranks.sort(key=lambda each: int(each.environ()["RANK"]))
            if case.victim == "rank":
                return ranks[case.number] if case.number < len(ranks) else None
            word = "grpo_mega.rewards" if case.victim == "reward worker" else "sglang"
            found = [each for each in tree if word in " ".join(each.cmdline())]
            return found[case.number % len(found)] if found else None
        return None


def differences(run: Path, expected: Path) -> list[str]:
    """Return what differs between two complete runs: state, metrics that do not depend on time, and rollouts."""
    try:
        found = [json.loads((each / "summary.json").read_text(encoding="utf-8")) for each in (run, expected)]
        lines = [_lines(each / "metrics.jsonl") for each in (run, expected)]
    except (OSError, ValueError) as error:
        return [f"the run is not complete: {error}"]
    problems = [
        f"summary.json: {key}={found[0].get(key)}, expected {found[1].get(key)}"
        for key in ("status", "steps", "policy_digest")
        if found[0].get(key) != found[1].get(key)
    ]
    if [line.get("step") for line in lines[0]] != [line.get("step") for line in lines[1]]:
        problems.append(f"metrics.jsonl: steps {[line.get('step') for line in lines[0]]}")
    else:
        for ours, theirs in zip(*lines, strict=True):
            keys = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
            problems += [f"step {ours.get('step')}: {key}={ours.get(key)}, expected {theirs.get(key)}" for key in keys]
    for path in sorted((expected / "rollouts").rglob("*")):
        other = run / "rollouts" / path.relative_to(expected / "rollouts")
        if path.is_file() and (not other.is_file() or other.read_bytes() != path.read_bytes()):
            problems.append(f"rollouts: {path.relative_to(expected)} differs")
    return problems


def use_problems(run: Path) -> list[str]:
    """Return what is wrong with a complete run that need not equal another one: its steps, and its use of prompts."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        steps = [line.get("step") for line in _lines(run / "metrics.jsonl")]
    except (OSError, ValueError) as error:
        return [f"the run is not complete: {error}"]
    if summary["status"] != "done" or steps != list(range(1, summary["steps"] + 1)):
        return [f"the run is not complete: status={summary['status']}, steps {steps}"]
    return read_prompt_use(run).problems()


def _lines(path: Path) -> list[Mapping[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if not depends_on_time(key)} for line in lines]


def depends_on_time(key: str) -> bool:
    """Return True if the metric has another value in each run, because it measures time or the machine."""
    return key.startswith(_TIMED) or any(part in key for part in _TIMED_PARTS)


def _wait_for_first_step(launcher: psutil.Popen, folder: Path) -> float:
    deadline = time.monotonic() + _RUN_SECONDS
    while not (folder / "metrics.jsonl").exists() and _is_running(launcher) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return time.monotonic()


def _is_running(process: psutil.Popen) -> bool:
    return process.poll() is None


def kill_with_children(process: psutil.Popen) -> None:
    """Kill the process and all of its children by process id, if they are running, and wait for their end."""
    tree = []
    with suppress(psutil.NoSuchProcess):
        tree = [*process.children(recursive=True), process]
    for member in tree:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(tree, timeout=10)
    process.wait(10)
