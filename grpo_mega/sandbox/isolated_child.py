"""The inside of the sandbox (sandbox.py): `python -I -S isolated_child.py`, with the standard library only.

Three processes. The *launcher* is the caller's child. The *keeper* enters new user, mount, process, network, IPC, host
name and cgroup namespaces and builds a root of read-only folders. *Init* is process 1 in there: it runs one program at
a time and afterwards kills whatever is left. Each dies with the one before it, and with init everything inside.

A program gets: no network device, no path of the host but the given ones, read-only, and `/work`, empty, in memory;
no capability, another user, no way to gain either; limits by the kernel; and a filter that refuses system calls which
programs of this kind have no use for and kernels have had holes in.

Lines of JSON on stdin: first `{"read_only": [...], "limits": {...}}`, then jobs; on stdout first `{"ready": true}` or
`{"error": ..., "step": ...}`, then one answer a job.
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
INNER_ID = 65534  # of the program inside: nobody
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000
_INODES = 4096

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
_MNT_DETACH = 2
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE, _OPEN_TREE_CLONE = -100, 0x1000, 0x8000, 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442  # the same on every machine
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

# Refused with EPERM. In order: tracing others; mounts and roots; namespaces; the new mount calls; kernel programs,
# events, faults and rings; keys; kernel images and modules; file handles; shared memory outside of any limit; sockets.
_REFUSED = {
    "x86_64": (
        *(101, 310, 311, 312, 438),
        *(165, 166, 155, 161, 272, 308, 428, 429, 430, 431, 432, 433, 442),
        *(321, 298, 323, 425, 426, 427),
        *(248, 249, 250, 246, 320, 175, 313, 176, 303, 304, 135),
        *(29, 64, 68, 240, 319, 447, 41),
    ),
    "aarch64": (
        *(117, 270, 271, 272, 438),
        *(40, 39, 41, 51, 97, 268, 428, 429, 430, 431, 432, 433, 442),
        *(280, 241, 282, 425, 426, 427),
        *(217, 218, 219, 104, 294, 105, 273, 106, 264, 265, 92),
        *(194, 190, 186, 180, 279, 447, 198),
    ),
}
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
_SYS_CLONE3 = 435

_libc = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """A step of the isolation failed; `step` names what the machine did not give."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(f"{step}: {reason}")
        self.step, self.reason = step, reason


def main() -> None:
    """The launcher: builds the sandbox and waits for its end."""
    setup = json.loads(sys.stdin.buffer.readline())
    _die_with_parent(int(sys.argv[1]))
    if platform.machine() not in _REFUSED:
        _refuse(SetupError("system call filter", f"no table for {platform.machine()}"))
    mapped, entered = os.pipe(), os.pipe()
    launcher = os.getpid()
    keeper = os.fork()
    if keeper == 0:
        os.close(mapped[1])  # or it would wait for itself, should the launcher end here
        try:
            _keep(setup, launcher, mapped[0], entered[1])
        except SetupError as error:
            _refuse(error)
        except OSError as error:
            _refuse(SetupError("root folder", str(error)))
    os.close(entered[1])
    try:
        if os.read(entered[0], 1):
            _map_ids(keeper)
            os.write(mapped[1], b"m")
    except SetupError as error:
        os.kill(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)
        _refuse(error)
    _, status = os.waitpid(keeper, 0)
    sys.exit(0 if status == 0 else 1)


def _refuse(error: SetupError) -> NoReturn:
    _say({"error": error.reason, "step": error.step})
    os._exit(3)


def _say(message: dict[str, Any]) -> None:
    data = json.dumps(message).encode("ascii") + b"\n"
    while data:
        data = data[os.write(1, data) :]


def _die_with_parent(parent: int) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() not in (parent, 0):  # 0: it is outside of this process namespace
        os._exit(1)


def _checked(step: str, result: int) -> int:
    if result < 0:
        raise SetupError(step, os.strerror(ctypes.get_errno()))
    return result


def _map_ids(keeper: int) -> None:
    """Who the keeper and the program are outside.

    Root becomes root for the keeper, so that it reads what root may read, and nobody for the program: the kernel
    exempts root from the limit on processes. Anyone else stays who they are, under the name of nobody.
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


def _keep(setup: dict[str, Any], launcher: int, mapped: int, entered: int) -> NoReturn:
    _die_with_parent(launcher)
    os.setsid()  # a signal to the own process group must not reach the caller
    if _libc.unshare(_NAMESPACES) != 0:
        raise SetupError("user namespace", f"unshare: {os.strerror(ctypes.get_errno())}")
    os.write(entered, b"e")
    if not os.read(mapped, 1):
        os._exit(1)
    _die_with_parent(launcher)  # again: new rights undo it
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
        _serve(setup["limits"])
    _, status = os.waitpid(init, 0)
    os._exit(0 if status == 0 else 1)


def _build_root(read_only: list[str]) -> None:
    """A root of its own: the given folders and the system's libraries, read-only, three devices, and `/work`."""
    _checked("mount namespace", _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    links = [(path, os.readlink(path)) for path in _LIBRARIES if os.path.islink(path)]
    linked = {path for path, _ in links}
    wanted = sorted({p for p in (*_LIBRARIES, *read_only) if os.path.exists(p) and p not in linked})
    folders = [p for i, p in enumerate(wanted) if not any(_is_inside(p, other) for other in wanted[:i])]
    trees = [(path, _tree(path, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)) for path in folders]
    trees += [(path, _tree(path, _ATTR_RDONLY | _ATTR_NOSUID)) for path in _DEVICES]
    are_folders = {path for path in folders if os.path.isdir(path)}  # some may be hidden from here on
    new = "/tmp"  # any folder does: it is hidden, not used, and only in here
    _mount_memory(new, 1 << 20, "0755")
    for path, tree in trees:
        target = new + path
        if path in are_folders:
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_RDONLY, 0o644))
        moved = _libc.syscall(_SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, target.encode(), _MOVE_MOUNT_F_EMPTY_PATH)
        _checked("read-only folders (Linux 5.12)", moved)
        os.close(tree)
    for path, target in links:
        if not os.path.lexists(new + path):
            os.makedirs(os.path.dirname(new + path), exist_ok=True)
            os.symlink(target, new + path)
    os.mkdir(new + WORK)
    os.chdir(new)
    _checked("root folder", _libc.syscall(_SYS_PIVOT_ROOT[platform.machine()], b".", b"."))
    _checked("root folder", _libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")
    _set_attributes(_AT_FDCWD, b"/", 0, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _tree(path: str, attributes: int) -> int:
    """A copy of the mounts at `path`, in no place yet."""
    tree = _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, path.encode(), _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC)
    _checked("read-only folders (Linux 5.12)", tree)
    _set_attributes(tree, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, attributes)
    return int(tree)


def _set_attributes(folder: int, path: bytes, flags: int, attributes: int) -> None:
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)
    result = _libc.syscall(_SYS_MOUNT_SETATTR, folder, path, flags, wanted, len(wanted))
    _checked("read-only folders (Linux 5.12)", result)


def _mount_memory(path: str, size: int, mode: str) -> None:
    options = f"size={size},nr_inodes={_INODES},mode={mode},uid={os.getuid()},gid={os.getgid()}"
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _checked("mount namespace", _libc.mount(b"tmpfs", path.encode(), b"tmpfs", flags, options.encode()))


def _serve(limits: dict[str, Any]) -> NoReturn:
    """Init: one program at a time, each in a `/work` of its own, until the caller has no more."""
    _libc.prctl(_PR_SET_DUMPABLE, 0)  # nothing inside may look into this process
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    program = _filter()
    _say({"ready": True})
    for line in sys.stdin.buffer:
        job = json.loads(line)
        try:
            answer = _run(job, limits, program)
        except (SetupError, OSError) as error:
            answer = {"error": str(error)}
        _end_everything()
        if _libc.umount2(WORK.encode(), _MNT_DETACH) != 0 and ctypes.get_errno() != errno.EINVAL:
            answer = {"error": "the folder of the last program cannot be removed"}
        _say(answer)
    os._exit(0)


def _end_everything() -> None:
    """Kill and reap all processes in here but this one."""
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _run(job: dict[str, Any], limits: dict[str, Any], program: bytes) -> dict[str, Any]:
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
            _become(job, [given[0], writing, given[1]], limits, program)
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
    file = os.memfd_create("given")
    data = text.encode("utf-8", "replace")
    while data:
        data = data[os.write(file, data) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _watch(child: int, reading: int, deadline: float, most: int) -> tuple[bytes, str]:
    """What the program writes, until it ends, runs out of time or writes too much."""
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
                    watched.remove(reading)  # closed; the program may go on without it
            if size > most:
                return b"".join(pieces)[:most], "output"
            if ready == [ended]:
                return b"".join(pieces), "ended"
            if left <= 0:
                return b"".join(pieces), "time"
    finally:
        os.close(ended)


def _become(job: dict[str, Any], descriptors: list[int], limits: dict[str, Any], program: bytes) -> None:
    """Turn this process into the program: the given descriptors become 0, 1 and 3, nothing else stays open."""
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
        (resource.RLIMIT_NPROC, limits["processes"] + (0 if privileged else 2)),  # keeper and init count too
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
    instructions = ctypes.create_string_buffer(program)
    code = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions)))
    if _libc.prctl(_PR_SET_SECCOMP, 2, code, 0, 0) != 0:
        return
    environment = {
        "HOME": WORK, "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", "TMPDIR": WORK,
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    os.execve(job["argv"][0], job["argv"], environment | job["environment"])


def _filter() -> bytes:
    """The filter of system calls, in the kernel's classic BPF: allowed unless refused."""
    machine = platform.machine()
    load, jump_equal, jump_any, jump_set, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, refuse, unknown, allow = 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x7FFF0000
    lines: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),  # the architecture: numbers of another one mean other calls
        (jump_equal, 1, 0, _ARCHITECTURE[machine]),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the number of the call
        (jump_any, 0, 1, 0x40000000),  # x32
        (give, 0, 0, refuse),
        (jump_equal, 0, 1, _SYS_CLONE3),  # its flags lie in memory; the C library then takes clone
        (give, 0, 0, unknown),
    ]
    for number in _REFUSED[machine]:
        lines += [(jump_equal, 0, 1, number), (give, 0, 0, refuse)]
    lines += [
        (jump_equal, 0, 3, _SYS_CLONE[machine]),
        (load, 0, 0, 16),  # the lower half of the first argument: the flags
        (jump_set, 0, 1, _NAMESPACES | 0x00000080),  # 0x80: a time namespace
        (give, 0, 0, refuse),
        (give, 0, 0, allow),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


if __name__ == "__main__":
    main()
