"""The child's side of the sandbox (sandbox.py): `python -I -S isolated_child.py PARENT_PID`, standard library only.

There are three processes. The *launcher* is the caller's child. The *keeper* enters new user, mount, process, network,
IPC, host name and cgroup namespaces, and builds a root file system of read-only folders. *Init* is process 1 of the
process namespace. It runs one program at a time and then kills every process that the program left. Each process dies
with its parent, and every process of the namespace dies with init.

A program has no network device. It sees the given paths of the host, read-only, and `/work`, which is empty and in
memory. It has no capability and another user, and cannot gain more rights. The kernel enforces its limits. A seccomp
filter denies dangerous system calls (system_call_filter.py).

stdin holds lines of JSON: first `{"read_only": [...], "limits": {...}, "namespaces": flags, "filter": hex}`, then jobs.
stdout gets `{"ready": true}` or `{"error": ..., "step": ...}`, then one answer per job.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

WORK = "/work"
INNER_ID = 65534  # user and group id of the programs
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_INODES = 4096

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
_MNT_DETACH = 2
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE, _OPEN_TREE_CLONE = -100, 0x1000, 0x8000, 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442  # the same number on every architecture
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

_libc = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """A step of the isolation failed; `step` names the feature that the machine does not offer."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(f"{step}: {reason}")
        self.step, self.reason = step, reason


def main() -> None:
    """Run the launcher: build the sandbox and wait for its end."""
    setup = json.loads(sys.stdin.buffer.readline())
    _die_with_parent(int(sys.argv[1]))
    mapped, entered = os.pipe(), os.pipe()
    launcher = os.getpid()
    keeper = os.fork()
    if keeper == 0:
        os.close(mapped[1])  # else the read below would never end if the launcher dies here
        try:
            _run_keeper(setup, launcher, mapped[0], entered[1])
        except SetupError as error:
            _report_and_exit(error)
        except OSError as error:
            _report_and_exit(SetupError("root folder", str(error)))
    os.close(entered[1])
    try:
        if os.read(entered[0], 1):
            _map_ids(keeper)
            os.write(mapped[1], b"m")
    except SetupError as error:
        os.kill(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)
        _report_and_exit(error)
    _, status = os.waitpid(keeper, 0)
    sys.exit(0 if status == 0 else 1)


def _report_and_exit(error: SetupError) -> NoReturn:
    _send({"error": error.reason, "step": error.step})
    os._exit(3)


def _send(message: dict[str, Any]) -> None:
    data = json.dumps(message).encode("ascii") + b"\n"
    while data:
        data = data[os.write(1, data) :]


def _die_with_parent(parent: int) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() not in (parent, 0):  # 0: the parent is outside of this process namespace
        os._exit(1)


def _check_result(step: str, result: int) -> int:
    if result < 0:
        raise SetupError(step, os.strerror(ctypes.get_errno()))
    return result


def _map_ids(keeper: int) -> None:
    """Write the map from user ids inside the namespace to user ids of the host.

    If the caller is root, the keeper is root too, so that it can read what root can read. Programs are user 65534,
    because the kernel exempts root from the limit on processes. Any other caller is mapped to user 65534 inside.
    """
    both = os.geteuid() == 0 and all(_is_mapped(INNER_ID, kind) for kind in ("uid", "gid"))
    try:
        for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
            lines = f"0 0 1\n{INNER_ID} {INNER_ID} 1\n" if both else f"{INNER_ID} {own} 1\n"
            if kind == "gid" and not both:
                Path(f"/proc/{keeper}/setgroups").write_text("deny", encoding="ascii")
            Path(f"/proc/{keeper}/{kind}_map").write_text(lines, encoding="ascii")
    except OSError as error:
        raise SetupError("user namespace", f"its map of ids cannot be written ({error.strerror})") from error


def _is_mapped(number: int, kind: str) -> bool:
    for line in Path(f"/proc/self/{kind}_map").read_text(encoding="ascii").splitlines():
        first, _, count = (int(word) for word in line.split())
        if first <= number < first + count:
            return True
    return False


def _run_keeper(setup: dict[str, Any], launcher: int, mapped: int, entered: int) -> NoReturn:
    _die_with_parent(launcher)
    os.setsid()  # a signal to this process group must not reach the caller
    if _libc.unshare(setup["namespaces"]) != 0:
        raise SetupError("user namespace", f"unshare: {os.strerror(ctypes.get_errno())}")
    os.write(entered, b"e")
    if not os.read(mapped, 1):
        os._exit(1)
    _die_with_parent(launcher)  # again: the change of credentials cleared it
    if os.getuid() not in (0, INNER_ID):
        raise SetupError("user namespace", "its map of ids has no effect")
    _build_root([str(path) for path in setup["read_only"]])
    socket.sethostname("sandbox")
    keeper = os.getpid()
    init = os.fork()
    if init == 0:
        _die_with_parent(keeper)
        if os.getpid() != 1:
            raise SetupError("process namespace", f"the first process in it is number {os.getpid()}")
        _run_init(setup["limits"], bytes.fromhex(setup["filter"]))
    _, status = os.waitpid(init, 0)
    os._exit(0 if status == 0 else 1)


def _build_root(read_only: list[str]) -> None:
    """Build a root with the given folders and the system's libraries, read-only, three devices, and `/work`."""
    _check_result("mount namespace", _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    links = [(path, os.readlink(path)) for path in _LIBRARIES if os.path.islink(path)]
    linked = {path for path, _ in links}
    paths = sorted({p for p in (*_LIBRARIES, *read_only) if os.path.exists(p) and p not in linked})
    folders = [p for i, p in enumerate(paths) if not any(_is_inside(p, other) for other in paths[:i])]
    trees = [(path, _clone_mounts(path, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)) for path in folders]
    trees += [(path, _clone_mounts(path, _ATTR_RDONLY | _ATTR_NOSUID)) for path in _DEVICES]
    are_folders = {path for path in folders if os.path.isdir(path)}  # read now: the mount below may hide some of them
    new = "/tmp"  # noqa: S108 - any folder works: the mount hides it in this namespace only
    _mount_memory(new, 1 << 20, "0755")
    for path, tree in trees:
        target = new + path
        if path in are_folders:
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_RDONLY, 0o644))
        moved = _libc.syscall(_SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, target.encode(), _MOVE_MOUNT_F_EMPTY_PATH)
        _check_result("read-only folders (Linux 5.12)", moved)
        os.close(tree)
    for path, target in links:
        if not os.path.lexists(new + path):
            os.makedirs(os.path.dirname(new + path), exist_ok=True)
            os.symlink(target, new + path)
    os.mkdir(new + WORK)
    os.chdir(new)
    _check_result("root folder", _libc.syscall(_SYS_PIVOT_ROOT[platform.machine()], b".", b"."))
    _check_result("root folder", _libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")
    _set_attributes(_AT_FDCWD, b"/", 0, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _clone_mounts(path: str, attributes: int) -> int:
    """Return a descriptor of a copy of the mounts at `path`; the copy is not mounted yet."""
    tree = _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, path.encode(), _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC)
    _check_result("read-only folders (Linux 5.12)", tree)
    _set_attributes(tree, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, attributes)
    return int(tree)


def _set_attributes(folder: int, path: bytes, flags: int, attributes: int) -> None:
    packed = struct.pack("=QQQQ", attributes, 0, 0, 0)
    result = _libc.syscall(_SYS_MOUNT_SETATTR, folder, path, flags, packed, len(packed))
    _check_result("read-only folders (Linux 5.12)", result)


def _mount_memory(path: str, size: int, mode: str) -> None:
    options = f"size={size},nr_inodes={_INODES},mode={mode},uid={os.getuid()},gid={os.getgid()}"
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _check_result("mount namespace", _libc.mount(b"tmpfs", path.encode(), b"tmpfs", flags, options.encode()))


def _run_init(limits: dict[str, Any], seccomp: bytes) -> NoReturn:
    """Run one program at a time, each with a new `/work`, until stdin is closed."""
    _libc.prctl(_PR_SET_DUMPABLE, 0)  # no program may read the memory of this process
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    _send({"ready": True})
    for line in sys.stdin.buffer:
        job = json.loads(line)
        try:
            answer = _run(job, limits, seccomp)
        except (SetupError, OSError) as error:
            answer = {"error": str(error)}
        _kill_all_others()
        if _libc.umount2(WORK.encode(), _MNT_DETACH) != 0 and ctypes.get_errno() != errno.EINVAL:
            answer = {"error": "the /work folder of the last program cannot be unmounted"}
        _send(answer)
    os._exit(0)


def _kill_all_others() -> None:
    """Kill and reap all processes of the namespace except this one."""
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _run(job: dict[str, Any], limits: dict[str, Any], seccomp: bytes) -> dict[str, Any]:
    """Run one program and return how it ended, with its output."""
    _mount_memory(WORK, limits["file_bytes"], "0777")
    for name, content in job["files"].items():
        with open(f"{WORK}/{name}", "x", encoding="utf-8", errors="replace") as file:
            file.write(content)
    given = [_in_memory(job["stdin"]), _in_memory(job["source"])]
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            _exec_program(job, [given[0], writing, given[1]], limits, seccomp)
        finally:
            os._exit(127)
    os.close(writing)
    for descriptor in given:
        os.close(descriptor)
    output, reason = _watch(child, reading, started + job["seconds"], limits["output_bytes"])
    os.close(reading)
    if reason != "ended":
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return {
        "reason": reason,
        "status": os.waitstatus_to_exitcode(status),
        "stdout": output.decode("utf-8", "replace"),
        "seconds": time.monotonic() - started,
    }


def _in_memory(text: str) -> int:
    """Return a descriptor of a file in memory that holds the text."""
    file = os.memfd_create("given")
    data = text.encode("utf-8", "replace")
    while data:
        data = data[os.write(file, data) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _watch(child: int, reading: int, deadline: float, max_bytes: int) -> tuple[bytes, str]:
    """Return the output of the program, and why reading stopped: it ended, ran out of time, or wrote too much."""
    os.set_blocking(reading, False)
    ended = os.pidfd_open(child)
    pieces: list[bytes] = []
    size, watched = 0, [reading, ended]
    try:
        while True:
            left = deadline - time.monotonic()
            ready = select.select(watched, [], [], max(0.0, left))[0]
            if reading in ready:
                piece = os.read(reading, 1 << 16)
                if piece:
                    pieces.append(piece)
                    size += len(piece)
                else:
                    watched.remove(reading)  # the program closed its stdout and may still be running
            if size > max_bytes:
                return b"".join(pieces)[:max_bytes], "output"
            if ready == [ended]:
                return b"".join(pieces), "ended"
            if left <= 0:
                return b"".join(pieces), "time"
    finally:
        os.close(ended)


def _exec_program(job: dict[str, Any], descriptors: list[int], limits: dict[str, Any], seccomp: bytes) -> None:
    """Set limits and filter, then exec the program. Only descriptors 0, 1, 2 and 3 stay open."""
    os.setsid()
    null = os.open("/dev/null", os.O_WRONLY)
    for number, descriptor in enumerate((descriptors[0], descriptors[1], null, descriptors[2])):
        os.dup2(os.dup2(descriptor, 100 + number), number)
    os.closerange(4, 4096)
    os.chdir(WORK)
    privileged = os.getuid() == 0
    for kind, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"] + (0 if privileged else 2)),  # the keeper and init count too
        (resource.RLIMIT_NOFILE, 128),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    if privileged:
        os.setgroups([])
        os.setresgid(INNER_ID, INNER_ID, INNER_ID)
        os.setresuid(INNER_ID, INNER_ID, INNER_ID)
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return
    instructions = ctypes.create_string_buffer(seccomp)
    code = ctypes.create_string_buffer(struct.pack("@HP", len(seccomp) // 8, ctypes.addressof(instructions)))
    if _libc.prctl(_PR_SET_SECCOMP, 2, code, 0, 0) != 0:
        return
    environment = {
        "HOME": WORK, "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", "TMPDIR": WORK,
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    os.execve(job["argv"][0], job["argv"], environment | job["environment"])  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main()
