"""The filter of system calls for programs in the sandbox, as a seccomp program in the kernel's classic BPF.

It denies calls which programs of this kind do not need and in which kernels have had vulnerabilities. All other calls
are allowed. Asserted by tests/unit/sandbox/test_sandbox.py.
"""

from __future__ import annotations

import errno
import struct

CLONE_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000
"""The flags of clone and unshare for user, mount, process, network, IPC, host name and cgroup namespaces."""
_CLONE_NEWTIME = 0x00000080

# Denied with EPERM. In order: tracing of other processes; mounts, roots, namespaces and the new mount calls; BPF
# programs, performance events, userfaultfd and io_uring; keys, kernel images, modules and file handles; shared memory
# that no limit counts, and sockets.
_DENIED = {
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


def build_filter(machine: str) -> bytes | None:
    """Return the BPF program for `platform.machine()`, 8 bytes per instruction, or None for an unknown machine."""
    if machine not in _DENIED:
        return None
    load, jump_equal, jump_greater_equal, jump_set, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, deny, unknown, allow = 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x7FFF0000
    lines: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),  # the architecture: the same number means another call on another architecture
        (jump_equal, 1, 0, _ARCHITECTURE[machine]),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the number of the call
        (jump_greater_equal, 0, 1, 0x40000000),  # x32
        (give, 0, 0, deny),
        (jump_equal, 0, 1, _SYS_CLONE3),  # a filter cannot read its flags, which lie in memory; glibc then uses clone
        (give, 0, 0, unknown),
    ]
    for number in _DENIED[machine]:
        lines += [(jump_equal, 0, 1, number), (give, 0, 0, deny)]
    lines += [
        (jump_equal, 0, 3, _SYS_CLONE[machine]),
        (load, 0, 0, 16),  # the lower half of the first argument: the flags
        (jump_set, 0, 1, CLONE_NAMESPACES | _CLONE_NEWTIME),
        (give, 0, 0, deny),
        (give, 0, 0, allow),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
