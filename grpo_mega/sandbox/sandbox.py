"""Runs untrusted programs in a sandbox; raises if isolation is unavailable. It never runs a program without isolation.

`isolated_child.py` builds the isolation from features that Linux offers to any user: namespaces, limits and a seccomp
filter. A `Sandbox` holds one set of namespaces. Each `run` starts with an empty `/work` and leaves no process.

Invariants (tests/unit/sandbox/test_sandbox.py): a program has no network. It reads no file of the host except the
interpreter and its libraries, and writes only to `/work`. It cannot exceed its limits, outlive its run or send a signal
to the caller. When a step of the isolation fails, no program runs.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from grpo_mega.sandbox.system_call_filter import CLONE_NAMESPACES, build_filter
from grpo_mega.types import UserError

START_SECONDS = 30.0
"""Limit for building the isolation, and for the answer of a program after its own limit."""

_MEGABYTE = 1 << 20
_REMEDIES = {
    "user namespace": "allow user namespaces: user.max_user_namespaces above 0, on Debian kernel.unprivileged_userns_"
    "clone=1, on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0, in a container a seccomp profile that allows "
    "unshare and mount (docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined)",
    "mount namespace": "allow mounts in user namespaces: on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0, in "
    "a container docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined",
    "read-only folders (Linux 5.12)": "use Linux 5.12 or newer, and a container profile that allows open_tree, "
    "move_mount and mount_setattr",
    "system call filter": "use x86_64 or aarch64",
}
_PROBE = "import os\nprint(os.getuid(), os.getcwd(), os.listdir('.'))"
_PROBED = "65534 /work []"


class SandboxError(RuntimeError):
    """The isolation could not be built, or was lost. No program ran outside of it."""


@dataclass(frozen=True)
class Limits:
    """Limits of one program: memory and CPU time per process; processes, files and output over all its processes."""

    cpu_seconds: int = 5
    memory_bytes: int = 512 * _MEGABYTE
    file_bytes: int = 16 * _MEGABYTE
    output_bytes: int = _MEGABYTE
    processes: int = 8


@dataclass(frozen=True)
class Outcome:
    """The end of a run: `ended` by itself with `status` (negative: a signal), or stopped for its time or its output."""

    reason: Literal["ended", "time", "output"]
    status: int
    stdout: str
    seconds: float

    @property
    def succeeded(self) -> bool:
        """True when the program ended by itself with status 0."""
        return self.reason == "ended" and self.status == 0


class Sandbox:
    """One set of namespaces; use as a context manager.

    Args:
        limits: of each program.
        read_only: folders and files of the host that programs can read, besides Python and the system's libraries.

    Raises:
        SandboxError: this machine does not offer the isolation; names the step that failed.
    """

    def __init__(self, limits: Limits, read_only: Sequence[str] = ()) -> None:
        seccomp = build_filter(platform.machine())
        if seccomp is None:
            raise SandboxError(_explain({"step": "system call filter", "error": f"no table for {platform.machine()}"}))
        child = Path(__file__).with_name("isolated_child.py")
        self._process = subprocess.Popen(
            [_python(), "-I", "-S", "-B", str(child), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
        )
        self._incoming = b""
        try:
            self._send(
                {
                    "limits": asdict(limits),
                    "read_only": [*python_folders(), *read_only],
                    "namespaces": CLONE_NAMESPACES,
                    "filter": seccomp.hex(),
                }
            )
            answer = self._receive(START_SECONDS)
        except BaseException:
            self.close()
            raise
        if "ready" not in answer:
            self.close()
            raise SandboxError(_explain(answer))

    def run(
        self,
        argv: Sequence[str],
        *,
        seconds: float,
        stdin: str = "",
        source: str = "",
        files: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Run one program to its end or to its limit.

        Args:
            argv: absolute path of the program, and its arguments.
            seconds: wall-clock limit.
            stdin: text at descriptor 0.
            source: text at descriptor 3.
            files: name -> content, written to `/work` before the start.
            environment: variables added to those that every program gets.

        Raises:
            SandboxError: the isolation was lost.
        """
        job = {"argv": [*argv], "seconds": seconds, "stdin": stdin, "source": source}
        self._send(job | {"files": dict(files or {}), "environment": dict(environment or {})})
        answer = self._receive(seconds + START_SECONDS)
        if "error" in answer:
            raise SandboxError(f"the sandbox cannot start a program: {answer['error']}")
        return Outcome(**answer)

    def run_python(self, source: str, *, seconds: float, stdin: str = "") -> Outcome:
        """Run the text of a Python program; see `run`."""
        return self.run(python_command(), seconds=seconds, stdin=stdin, source=source)

    def close(self) -> None:
        """Kill the processes of the namespaces, and with them the namespaces."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # some bytes were not written yet
                    continue

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode("ascii") + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:  # it exited, or `close` was called
            raise SandboxError("the sandbox process exited") from error

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._incoming:
            ready = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]
            piece = os.read(descriptor, 1 << 20) if ready else b""
            if not piece:
                raise SandboxError(
                    "the sandbox process exited" if ready else f"the sandbox did not answer within {seconds:g} s"
                )
            self._incoming += piece
        line, _, self._incoming = self._incoming.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


def check_limits(seconds: float, usual: float, **numbers: int) -> None:
    """Check the limits in the arguments of a reward that runs programs.

    Args:
        seconds: wall-clock limit.
        usual: the reward's default, named in the remedy.
        numbers: further arguments by name; each must be a whole number above 0.

    Raises:
        UserError: a value is out of range; names the argument.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0.1 <= seconds <= 3600:
        raise UserError(f"seconds={seconds!r} must be a number from 0.1 to 3600", remedy=f"use for example {usual}")
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{name}={value!r} must be a whole number above 0", remedy="correct it, or leave it out")


@functools.cache
def require_isolation() -> None:
    """Run a harmless program in a sandbox to check that isolation is available; the result is kept for the process.

    Raises:
        UserError: isolation is unavailable; names the missing feature and how to enable it.
    """
    if sys.platform != "linux":
        raise UserError(f"programs run only in a sandbox, which is not supported on {sys.platform}", remedy="use Linux")
    try:
        with Sandbox(Limits()) as sandbox:
            outcome = sandbox.run_python(_PROBE, seconds=START_SECONDS)
    except SandboxError as error:
        raise UserError(f"programs run only in a sandbox, and isolation is unavailable: {error}") from error
    if not outcome.succeeded or outcome.stdout.strip() != _PROBED:
        raise UserError(
            f"programs run only in a sandbox, which cannot run Python on this machine: {outcome}",
            remedy=f"the user 65534 must be able to read {', '.join(python_folders())}",
        )


def python_command() -> list[str]:
    """Return the command that runs the Python program at descriptor 3, without site packages."""
    boot = (
        "with open(3, encoding='utf-8') as file: source = file.read()\n"
        "exec(compile(source, 'program.py', 'exec'), {'__name__': '__main__'})"
    )
    return [_python(), "-s", "-S", "-P", "-B", "-X", "utf8", "-c", boot]


def python_folders() -> list[str]:
    """Return the paths that the interpreter needs, without the packages of a virtual environment."""
    base = Path(sys.base_exec_prefix)
    return [path for path in (_python(), str(base / "lib"), str(base / "lib64")) if os.path.exists(path)]


def _python() -> str:
    return os.path.realpath(sys.executable)


def _explain(answer: Mapping[str, Any]) -> str:
    step = str(answer.get("step", "sandbox"))
    remedy = _REMEDIES.get(step, "see docs/rewards.md, Programs")
    return f"{step} ({answer.get('error', answer)}); {remedy}"
