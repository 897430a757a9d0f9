"""Programs in the sandbox cannot exceed their limits, reach the host or outlive their run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from grpo_mega.sandbox.sandbox import Limits, Outcome, Sandbox, SandboxError, require_isolation
from grpo_mega.sandbox.system_call_filter import CLONE_NAMESPACES
from grpo_mega.types import UserError

REPOSITORY = Path(__file__).resolve().parents[3]
LIMITS = Limits(cpu_seconds=2, memory_bytes=256 << 20, file_bytes=1 << 20, output_bytes=10_000, processes=6)
SECONDS = 60.0


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    try:
        require_isolation()
    except UserError as error:
        pytest.skip(str(error))
    with Sandbox(LIMITS) as box:
        yield box


def run_program(sandbox: Sandbox, source: str, stdin: str = "") -> Outcome:
    return sandbox.run_python(source, seconds=SECONDS, stdin=stdin)


def evaluate_inside(sandbox: Sandbox, expression: str) -> str:
    """Return the value of the expression inside the sandbox, or the name of the exception that it raises."""
    source = f"""
import ctypes, glob, os, signal, socket, subprocess, sys
try:
    print(({expression}))
except BaseException as error:
    print(type(error).__name__, getattr(error, "errno", ""))
"""
    outcome = run_program(sandbox, source)
    assert outcome.succeeded, outcome
    return outcome.stdout.strip()


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 120.0
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def all_command_lines() -> str:
    """Return the command lines of all processes of this machine."""
    texts = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            texts.append(process.read_bytes().decode("utf-8", "replace"))
    return "\n".join(texts)


def test_a_program_reads_its_input_and_its_output_is_returned(sandbox: Sandbox) -> None:
    outcome = run_program(sandbox, "print(sum(map(int, input().split())), 'é')", stdin="1 2 3\n")
    assert (outcome.reason, outcome.status, outcome.stdout) == ("ended", 0, "6 é\n")
    assert run_program(sandbox, "raise SystemExit(3)").status == 3
    assert run_program(sandbox, "def").status == 1


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "9**9**9",
        "import re\nre.match('(a+)+b', 'a' * 100)",
        "import signal\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n  except Exception: pass\n"
        "while True: pass",
        "import os\nos.close(0); os.close(1); os.close(2)\nwhile True: pass",
    ],
)
def test_a_program_that_does_not_end_is_ended_at_its_time(sandbox: Sandbox, source: str) -> None:
    outcome = sandbox.run_python(source, seconds=0.5)
    assert (outcome.reason, outcome.status) == ("time", -signal.SIGKILL)


def test_processor_time_is_limited_in_addition_to_wall_clock_time(sandbox: Sandbox) -> None:
    outcome = sandbox.run_python("while True: pass", seconds=60.0)
    assert outcome.reason == "ended"
    assert outcome.status in (-signal.SIGXCPU, -signal.SIGKILL)


def test_memory_is_limited(sandbox: Sandbox) -> None:
    assert evaluate_inside(sandbox, "len('a' * 10**10)") == "MemoryError"
    assert evaluate_inside(sandbox, "len('a' * 10**6)") == "1000000"


def test_a_fork_bomb_is_limited_to_its_number_of_processes(sandbox: Sandbox) -> None:
    source = """
import os, time
started = 0
for _ in range(100):
    try:
        if os.fork() == 0:
            time.sleep(100)
        started += 1
    except OSError:
        break
print(started)
"""
    assert run_program(sandbox, source).stdout.strip() == str(LIMITS.processes - 1)
    bomb = sandbox.run_python("import os\nwhile True:\n try: os.fork()\n except OSError: pass", seconds=0.5)
    assert bomb.reason == "time"
    assert run_program(sandbox, "print('the next one works')").succeeded


def test_files_are_limited_and_each_program_starts_with_an_empty_folder(sandbox: Sandbox) -> None:
    assert (
        evaluate_inside(sandbox, "os.listdir('.'), os.getcwd(), open('a', 'w').write('x' * 1000)")
        == "([], '/work', 1000)"
    )
    assert evaluate_inside(sandbox, "os.listdir('.')") == "[]"
    assert evaluate_inside(sandbox, "open('a', 'wb').write(b'x' * 10**7)") in ("OSError 27", "OSError 28")
    assert evaluate_inside(sandbox, "[open(str(n), 'w').close() for n in range(10**5)]") == "OSError 28"


def test_output_is_cut_at_its_limit(sandbox: Sandbox) -> None:
    outcome = run_program(sandbox, "while True: print('x' * 1000)")
    assert (outcome.reason, len(outcome.stdout)) == ("output", LIMITS.output_bytes)


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("open('/etc/passwd').read()", "FileNotFoundError 2"),
        ("os.listdir('/home')", "FileNotFoundError 2"),
        ("os.listdir('/proc')", "FileNotFoundError 2"),
        ("os.listdir('/tmp')", "FileNotFoundError 2"),
        (f"os.listdir({str(REPOSITORY)!r})", "FileNotFoundError 2"),
        ("sorted(os.listdir('/dev'))", "['null', 'urandom', 'zero']"),
        ("open('/x', 'w')", "OSError 30"),
        ("open('/usr/lib/x', 'w')", "OSError 30"),
        ("os.access(os.__file__, os.R_OK), os.access(os.__file__, os.W_OK)", "(True, False)"),
        ("os.mkdir('/work/../x')", "OSError 30"),
        ("os.getuid(), os.getgid(), os.getgroups()", "(65534, 65534, [])"),
        ("os.environ['HOME'], sorted(os.environ)[:3]", "('/work', ['HOME', 'LANG', 'OMP_NUM_THREADS'])"),
        ("os.getppid()", "1"),
    ],
)
def test_nothing_of_the_host_can_be_read_or_written(sandbox: Sandbox, expression: str, answer: str) -> None:
    assert evaluate_inside(sandbox, expression) == answer


@pytest.mark.parametrize(
    "expression",
    [
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "os.memfd_create('x')",
        "socket.if_nameindex()[1:] and 'a device'",
    ],
)
def test_there_is_no_network(sandbox: Sandbox, expression: str) -> None:
    assert evaluate_inside(sandbox, expression) == "PermissionError 1"


def test_rights_cannot_be_gained(sandbox: Sandbox) -> None:
    failed = "(-1, 1)"
    call = "(ctypes.CDLL(None, use_errno=True).{}, ctypes.get_errno())"
    assert evaluate_inside(sandbox, call.format("unshare(0x10000000)")) == failed
    assert evaluate_inside(sandbox, call.format("mount(b'x', b'/work', b'tmpfs', 0, None)")) == failed
    assert evaluate_inside(sandbox, call.format("umount2(b'/work', 2)")) == failed
    assert evaluate_inside(sandbox, call.format("ptrace(16, 1, 0, 0)")) == failed
    assert evaluate_inside(sandbox, call.format("syscall(321, 0, 0, 0)")) == failed  # bpf
    assert evaluate_inside(sandbox, "os.setuid(0)") in ("PermissionError 1", "OSError 22")
    assert evaluate_inside(sandbox, "os.chroot('.')") == "PermissionError 1"
    assert evaluate_inside(sandbox, "os.kill(1, 9)") in ("PermissionError 1", "None")  # process 1 ignores it
    assert run_program(sandbox, "print('process 1 is there')").succeeded


def test_kill_of_every_process_reaches_no_process_outside(sandbox: Sandbox) -> None:
    source = (
        "import os, signal\nfor pid in (0, -1, os.getppid()):\n  try: os.kill(pid, signal.SIGKILL)\n  except OSError: 0"
    )
    run_program(sandbox, source)
    assert run_program(sandbox, "print(1)").succeeded


def test_a_process_that_detaches_itself_ends_with_its_program(sandbox: Sandbox) -> None:
    source = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open("alive", "w").close()
        while True:
            time.sleep(0.01)
    os._exit(0)
while not os.path.exists("alive"):
    time.sleep(0.01)
print("left", flush=True)
os._exit(0)
"""
    assert run_program(sandbox, source).stdout == "left\n"
    others = "[n for n in range(2, 400) if n != os.getpid() and ctypes.CDLL(None).getsid(n) >= 0]"
    assert evaluate_inside(sandbox, others) == "[]"


def test_descriptors_of_one_program_are_closed_for_the_next(sandbox: Sandbox) -> None:
    assert evaluate_inside(sandbox, "[n for n in range(200) if ctypes.CDLL(None).fcntl(n, 1) >= 0]") == "[0, 1, 2]"


def test_every_process_inside_ends_with_the_process_that_started_the_sandbox(sandbox: Sandbox) -> None:
    marker = f"time.sleep(1000) # {os.getpid()}"
    source = f"""
import subprocess, sys
from grpo_mega.sandbox.sandbox import Limits, Sandbox, python_command
box = Sandbox(Limits())
print("ready", flush=True)
box.run([*python_command()[:-1], "import time; {marker}"], seconds=1000.0)
"""
    starter = subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    assert starter.stdout is not None
    assert starter.stdout.readline() == b"ready\n"
    wait_for(lambda: marker in all_command_lines())
    starter.kill()
    starter.wait()
    starter.stdout.close()
    wait_for(lambda: marker not in all_command_lines())


LAUNCHER_ENDS = """
import os, signal
from grpo_mega.sandbox import isolated_child
fork = os.fork
def reporting_fork():
    child = fork()
    if child:
        os.write(2, b"%d" % child)
        {at_fork}
    return child
os.fork = reporting_fork
isolated_child._map_ids = lambda keeper: os.kill(os.getpid(), signal.SIGKILL)
isolated_child.main()
"""


@pytest.mark.parametrize("at_fork", ["os.kill(os.getpid(), signal.SIGKILL)", "pass"], ids=["fork", "map_of_ids"])
def test_the_keeper_ends_when_its_launcher_dies_during_the_setup(sandbox: Sandbox, at_fork: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LAUNCHER_ENDS.format(at_fork=at_fork), str(os.getpid())],
        input=json.dumps({"read_only": [], "namespaces": CLONE_NAMESPACES}).encode() + b"\n",
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=SECONDS,
    )
    assert ended.returncode == -signal.SIGKILL
    keeper = int(ended.stderr)
    wait_for(lambda: not is_running(keeper))


def is_running(pid: int) -> bool:
    """Return True for a process that exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


WITHOUT_NAMESPACES = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
user, group = os.getuid(), os.getgid()
assert libc.unshare(0x10000000) == 0
for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
with open("/proc/sys/user/max_user_namespaces", "w") as file:
    file.write("0")
"""


def test_a_machine_without_namespaces_is_an_error_that_names_the_missing_feature(sandbox: Sandbox) -> None:
    source = f"""{WITHOUT_NAMESPACES}
from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import build_rewards
from grpo_mega.sandbox.sandbox import Limits, Sandbox, SandboxError
from grpo_mega.types import UserError
try:
    Sandbox(Limits())
except SandboxError as error:
    print("SandboxError", error)
try:
    build_rewards([RewardTerm(name="code")])
except UserError as error:
    print("UserError", error)
"""
    found = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = found.stdout.splitlines()
    assert first.startswith("SandboxError user namespace (unshare: No space left on device); allow user namespaces: ")
    assert second.startswith("UserError reward.terms[0].args: programs run only in a sandbox")
    assert "kernel.apparmor_restrict_unprivileged_userns=0" in second


def test_an_ordinary_user_gets_the_same_isolation(sandbox: Sandbox) -> None:
    python = Path("/usr/bin/python3")
    if os.geteuid() != 0 or not python.exists() or not os.access(REPOSITORY / "grpo_mega", os.R_OK):
        pytest.skip("needs root, to become another user, and /usr/bin/python3")
    source = """
import os
os.setgroups([]); os.setgid(12345); os.setuid(12345)
from grpo_mega.sandbox.sandbox import Limits, Sandbox
bomb = (
    "import os, time\\nn = 0\\n"
    "try:\\n  while os.fork(): n += 1\\n  time.sleep(9)\\nexcept OSError: print(n, os.getuid())"
)
with Sandbox(Limits(processes=6)) as box:
    print(box.run_python(bomb, seconds=5.0).stdout, end="")
    print(box.run_python("open('/etc/passwd')", seconds=5.0).status)
    print(box.run_python("import socket; socket.socket()", seconds=5.0).status)
"""
    found = subprocess.run(
        [str(python), "-c", source], env={"PYTHONPATH": str(REPOSITORY)}, cwd="/", capture_output=True, text=True
    )
    if found.returncode != 0 and "No module named" in found.stderr:
        pytest.skip(f"{python} is too old")
    assert found.stdout.splitlines() == ["5 65534", "1", "1"], found.stderr


def test_a_lost_sandbox_is_an_error_and_never_an_outcome() -> None:
    with Sandbox(LIMITS) as box:
        box.close()
        with pytest.raises(SandboxError, match="exited"):
            box.run_python("print(1)", seconds=1.0)
