"""Runs programs that nobody has read, or refuses: there is no way here to run one outside of the sandbox.

The isolation is built by `isolated_child.py`, from what Linux offers to any user: namespaces, limits and a filter of
system calls. A `Sandbox` holds one set of namespaces; each `run` starts with an empty `/work` and ends with no process.

Invariants (tests/unit/sandbox/test_sandbox.py): a program sees no network, no file of the host but the interpreter and
its libraries, and writes to `/work` alone; no limit can be passed; nothing outlives its run; no signal reaches the
caller; where a step of the isolation fails nothing is run.
"""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from grpo_mega.types import UserError

START_SECONDS = 30.0
"""Limit for building the isolation, and past its own limit for an answer."""

_MEGABYTE = 1 << 20
_REMEDIES = {
    "user namespace": "allow user namespaces: user.max_user_namespaces above 0, on Debian kernel.unprivileged_userns_"
    "clone=1, on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0, in a container a seccomp profile that lets "
    "unshare and mount through (docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined)",
    "mount namespace": "allow mounts in user namespaces: on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0, in "
    "a container docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined",
    "read-only folders (Linux 5.12)": "use Linux 5.12 or newer, and a container profile that lets open_tree, "
    "move_mount and mount_setattr through",
    "system call filter": "use x86_64 or aarch64",
}
_PROBE = "import os\nprint(os.getuid(), os.getcwd(), os.listdir('.'))"
_PROBED = "65534 /work []"


class SandboxError(RuntimeError):
    """The isolation could not be built or was lost; nothing was run outside of it."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. Of each process: memory and CPU time; of all together: processes, files, output."""

    cpu_seconds: int = 5
    memory_bytes: int = 512 * _MEGABYTE
    file_bytes: int = 16 * _MEGABYTE
    output_bytes: int = _MEGABYTE
    processes: int = 8


@dataclass(frozen=True)
class Outcome:
    """How a run ended: by itself, with `status` (negative: a signal), or stopped for its time or its output."""

    reason: Literal["ended", "time", "output"]
    status: int
    stdout: str
    seconds: float

    @property
    def succeeded(self) -> bool:
        """Ended by itself with status 0."""
        return self.reason == "ended" and self.status == 0


class Sandbox:
    """One set of namespaces; use as a context manager.

    Args:
        limits: of each program.
        read_only: folders and files of the host that programs see besides Python and the system's libraries.

    Raises:
        SandboxError: this machine does not give the isolation; names the step.
    """

    def __init__(self, limits: Limits, read_only: Sequence[str] = ()) -> None:
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
            self._send({"limits": asdict(limits), "read_only": [*python_folders(), *read_only]})
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
            seconds: wall clock.
            stdin: what it reads.
            source: what it finds at descriptor 3.
            files: name -> content, in `/work`.
            environment: variables besides the few that every program gets.

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
        """`run` for the text of a Python program."""
        return self.run(python_command(), seconds=seconds, stdin=stdin, source=source)

    def close(self) -> None:
        """End the namespaces and everything in them."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # what was still to be written
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
        except (BrokenPipeError, ValueError) as error:  # gone, or closed here
            raise SandboxError("the sandbox has ended") from error

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._incoming:
            ready = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]
            piece = os.read(descriptor, 1 << 20) if ready else b""
            if not piece:
                raise SandboxError("the sandbox has ended" if ready else f"the sandbox is silent for {seconds:g} s")
            self._incoming += piece
        line, _, self._incoming = self._incoming.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


def check_limits(seconds: float, usual: float, **numbers: int) -> None:
    """Of a reward that runs programs; `usual` seconds are its own default, `numbers` go by the names of its arguments.

    Raises:
        UserError: names the argument.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0.1 <= seconds <= 3600:
        raise UserError(
            f"seconds={seconds!r} is no number of seconds from 0.1 to 3600", remedy=f"use for example {usual}"
        )
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{name}={value!r} is no whole number above 0", remedy="leave it out or correct it")


@functools.cache
def require_isolation() -> None:
    """Run a harmless program in a sandbox, once per process.

    Raises:
        UserError: names what this machine does not give, and how to get it.
    """
    if sys.platform != "linux":
        raise UserError(f"programs run in a sandbox only, and there is none for {sys.platform}", remedy="use Linux")
    try:
        with Sandbox(Limits()) as sandbox:
            outcome = sandbox.run_python(_PROBE, seconds=START_SECONDS)
    except SandboxError as error:
        raise UserError(f"programs run in a sandbox only, and this machine gives none: {error}") from error
    if not outcome.succeeded or outcome.stdout.strip() != _PROBED:
        raise UserError(
            f"programs run in a sandbox only, and the one of this machine cannot run Python: {outcome}",
            remedy=f"the user 65534 must be able to read {', '.join(python_folders())}",
        )


def python_command() -> list[str]:
    """What runs the Python program at descriptor 3: no site packages, hashes that do not change from run to run."""
    boot = (
        "with open(3, encoding='utf-8') as file: source = file.read()\n"
        "exec(compile(source, 'program.py', 'exec'), {'__name__': '__main__'})"
    )
    return [_python(), "-s", "-S", "-P", "-B", "-X", "utf8", "-c", boot]


def python_folders() -> list[str]:
    """What the interpreter needs to run, without packages that were installed into a virtual environment."""
    base = Path(sys.base_exec_prefix)
    return [path for path in (_python(), str(base / "lib"), str(base / "lib64")) if os.path.exists(path)]


def _python() -> str:
    return os.path.realpath(sys.executable)


def _explain(answer: Mapping[str, Any]) -> str:
    step = str(answer.get("step", "sandbox"))
    remedy = _REMEDIES.get(step, "see docs/rewards.md, Programs")
    return f"{step} ({answer.get('error', answer)}); {remedy}"
