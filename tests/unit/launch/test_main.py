"""grpo_mega.launch: how a job is started, its ranks, and the effect of a failing rank."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Timer
from typing import Any

import pytest

from grpo_mega.launch import main
from grpo_mega.launch.rendezvous import NodeInfo, rendezvous
from grpo_mega.launch.supervisor import run_ranks
from grpo_mega.parallel.ports import free_port
from grpo_mega.types import UserError

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}


def rank_environments(num_ranks: int) -> list[dict[str, str]]:
    return [{**os.environ, "RANK": str(rank)} for rank in range(num_ranks)]


def test_the_kind_of_start_is_detected_from_the_environment() -> None:
    assert main.find_place({"RANK": "0", "WORLD_SIZE": "2", **STEP}) == "worker"
    assert main.find_place(STEP) == "slurm_step"
    assert main.find_place({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}) == "slurm_allocation"  # sbatch's own script
    assert main.find_place({**STEP, "SLURM_STEP_ID": "4294967290"}) == "slurm_allocation"  # salloc's interactive shell
    assert main.find_place({"RANK": "0"}) == "machine"


def test_a_master_port_in_use_is_named() -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen(1)
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"MASTER_PORT={port} is in use"):
            main.machine_node({"MASTER_PORT": str(port)}, 2)
        joined = main.machine_node(
            {"MASTER_PORT": str(port), "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0"}, 2
        )  # the second machine connects to that port, it does not listen on it
    assert (joined.num_ranks, joined.master_port) == (1, port)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"NNODES": "3", "NODE_RANK": "0", "MASTER_ADDR": "a"},
            "run.world_size=8 must be a multiple.* nodes, 3",
        ),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2 must be below NNODES=2"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, r"NODE_RANK=\(unset\)"),
        ({"NNODES": "2", "NODE_RANK": "1"}, r"MASTER_ADDR=\(unset\)"),
        ({"NNODES": "two"}, "NNODES=two must be a whole number >= 1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 must be at most 65535"),
    ],
)
def test_wrong_variables_of_several_machines_are_named(env: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main.machine_node(env, 8)


@pytest.mark.parametrize(
    ("tasks", "nodes", "world_size", "expected"),
    [
        (2, 2, 8, (4, None)),  # one task per node: an agent for four ranks
        (2, 2, 2, (1, None)),  # both match: an agent
        (8, 2, 8, (4, 0)),  # as many tasks as ranks: a worker
    ],
)
def test_slurm_step_is_agent_or_worker(
    tasks: int, nodes: int, world_size: int, expected: tuple[int, int | None]
) -> None:
    env = {**STEP, "SLURM_NTASKS": str(tasks), "SLURM_NNODES": str(nodes), "MASTER_ADDR": "host0"}
    node, local_rank = main.slurm_node(env, world_size)
    assert (node.num_ranks, local_rank) == expected
    assert (node.num_nodes, node.node_rank, node.master_addr) == (nodes, 1, "host0")
    assert node.master_port == main.slurm_node({**env, "SLURM_NODEID": "0"}, world_size)[0].master_port


def test_a_slurm_step_with_another_number_of_tasks_is_rejected() -> None:
    env = {**STEP, "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "MASTER_ADDR": "host0"}
    with pytest.raises(UserError, match=r"run\.world_size=8.* 4 tasks on 2 nodes"):
        main.slurm_node(env, 8)


@pytest.mark.parametrize("tasks", ["2,1", "2(x2),1"])
def test_a_slurm_step_with_unequal_nodes_is_rejected_with_the_counts(tasks: str) -> None:
    num_tasks, num_nodes = (3, 2) if tasks == "2,1" else (5, 3)
    step = {"SLURM_NTASKS": str(num_tasks), "SLURM_NNODES": str(num_nodes), "SLURM_STEP_TASKS_PER_NODE": tasks}
    with pytest.raises(UserError, match=r"2, 1 tasks on its nodes: .* --ntasks-per-node"):
        main.slurm_node({**STEP, **step, "MASTER_ADDR": "host0"}, num_tasks)


def test_a_requeued_step_uses_another_port_than_the_lost_one() -> None:
    assert main.slurm_port(STEP) != main.slurm_port({**STEP, "SLURM_RESTART_COUNT": "1"})


def test_srun_starts_one_task_per_node_of_the_allocation() -> None:
    command = main.srun_command({"SLURM_JOB_NUM_NODES": "3"}, "launch/train.sh", ["a.yaml", "train.steps=2"], 12.5)
    assert command[0] == "srun"
    assert {"--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=13"} <= set(command)
    assert command[-3:] == ["launch/train.sh", "a.yaml", "train.steps=2"]


def test_the_exit_code_is_zero_if_all_ranks_return_zero() -> None:
    assert run_ranks([sys.executable, "-S", "-c", "pass"], rank_environments(2)) == 0


FAILING = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.stderr.write("rank 1: data.train=x is missing\\n")
    sys.exit(CODE)
try:
    time.sleep(60)
finally:
    pass
"""


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (1, 1), (77, 1)])
def test_the_first_failing_rank_ends_the_others_and_gives_the_exit_code(
    code: int, expected: int, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    started = time.monotonic()
    command = [sys.executable, "-S", "-c", FAILING.replace("CODE", str(code))]
    assert run_ranks(command, rank_environments(3)) == expected
    assert time.monotonic() - started < 8
    assert capfdbinary.readouterr().err == b"rank 1: data.train=x is missing\n"


LATE_NOISE = """
import os, signal, sys, time
def noise(*_):
    sys.stderr.write("connection closed by peer\\n")
    sys.exit(1)
signal.signal(signal.SIGTERM, noise)
if os.environ["RANK"] == "0":
    while not os.path.exists(os.environ["READY"]):
        time.sleep(0.05)
    sys.stderr.write("the cause\\n")
    sys.exit(1)
open(os.environ["READY"], "w").close()  # its handler is in place
time.sleep(60)
"""


def test_the_message_of_the_first_failing_rank_is_the_last_on_the_screen(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    ranks = [{**env, "READY": str(tmp_path / "ready")} for env in rank_environments(2)]
    assert run_ranks([sys.executable, "-S", "-c", LATE_NOISE], ranks) == 1
    assert capfdbinary.readouterr().err.splitlines() == [
        b"the cause",
        b"connection closed by peer",
        b"launch: the last lines of rank 0, which failed first:",
        b"the cause",
    ]


SILENT_FIRST = """
import os, signal, sys, time
if os.environ["RANK"] == "2":
    os._exit(2)  # leaves the message to rank 0, which has the same error
time.sleep(1.0)
if os.environ["RANK"] == "0":
    LATER
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("later", "last"),
    [
        ('sys.stderr.write("error: the cause\\n"); sys.exit(2)', b"error: the cause"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", b"launch: rank 0 was ended by SIGSEGV"),
        ("pass", b"launch: rank 2 ended with exit code 2 and no message"),
    ],
)
def test_a_rank_that_ends_without_a_message_leaves_the_last_line_to_the_reason(
    later: str, last: bytes, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert run_ranks([sys.executable, "-S", "-c", SILENT_FIRST.replace("LATER", later)], rank_environments(3)) == 2
    assert capfdbinary.readouterr().err.splitlines() == [last]


def test_killed_rank_is_named_with_its_signal(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    kill_itself = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_ranks([sys.executable, "-S", "-c", kill_itself], rank_environments(1)) == 1
    assert b"launch: rank 0 was ended by SIGKILL" in capfdbinary.readouterr().err


KILLED_FIRST = """
import os, signal, sys, time
def end(*_):
    with open(os.environ["FOLDER"] + "/screen") as screen, open(os.environ["FOLDER"] + "/seen", "w") as seen:
        seen.write(screen.read())
    sys.stderr.write("connection closed by peer\\n")
    sys.stderr.flush()
    os._exit(1)
if os.environ["RANK"] == "1":
    signal.signal(signal.SIGTERM, end)
    open(os.environ["FOLDER"] + "/ready", "w").close()
    time.sleep(60)
while not os.path.exists(os.environ["FOLDER"] + "/ready"):
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_rank_is_named_before_the_other_ranks_are_ended_and_again_after_their_lines(tmp_path: Path) -> None:
    code = f"""
import os, sys
from grpo_mega.launch.supervisor import run_ranks
env = [{{**os.environ, "RANK": str(r)}} for r in range(2)]
sys.exit(run_ranks([sys.executable, "-S", "-c", {KILLED_FIRST!r}], env))
"""
    with (tmp_path / "screen").open("wb") as screen:
        env = {**os.environ, "FOLDER": str(tmp_path)}
        assert subprocess.run([sys.executable, "-c", code], env=env, stderr=screen, check=False).returncode == 1
    line = "launch: rank 0 was ended by SIGKILL (the usual cause: out of memory)"
    assert (tmp_path / "seen").read_text().splitlines() == [line]
    assert (tmp_path / "screen").read_text().splitlines() == [line, "connection closed by peer", line]


AGENT = """
import os, sys
from grpo_mega.launch.supervisor import run_ranks
work = "import os, time; open(os.environ['PIDS'] + '/' + str(os.getpid()), 'w'); time.sleep(60)"
sys.exit(run_ranks([sys.executable, "-S", "-c", work], [{**os.environ, "RANK": str(r)} for r in range(2)]))
"""


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_rank_outlives_its_agent(tmp_path: Path, number: signal.Signals, expected: int) -> None:
    agent = subprocess.Popen([sys.executable, "-c", AGENT], env={**os.environ, "PIDS": str(tmp_path)}, stderr=-3)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    agent.send_signal(number)
    assert agent.wait(timeout=15) == expected
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_running(pid)]


def test_a_signal_while_the_ranks_are_started_still_reaches_them(monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def interrupted(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        process = start(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    begin = time.monotonic()
    assert run_ranks([sys.executable, "-S", "-c", "import time; time.sleep(60)"], rank_environments(1)) == 130
    assert time.monotonic() - begin < 30


STOPPING = """
import os, signal, subprocess, sys, time
child = subprocess.Popen(["sleep", "2"])  # a reward worker, which must not be ended
open(os.environ["PIDS"] + "/" + os.environ["RANK"], "w").close()
while signal.SIGUSR1 not in signal.sigpending():
    time.sleep(0.05)
sys.exit(130 if child.wait() == 0 else 1)
"""


def test_a_stop_request_reaches_every_rank_and_ends_no_child(tmp_path: Path) -> None:
    code = f"""
import os, sys
from grpo_mega.launch.supervisor import run_ranks
env = [{{**os.environ, "RANK": str(r)}} for r in range(2)]
sys.exit(run_ranks([sys.executable, "-S", "-c", {STOPPING!r}], env))
"""
    agent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PIDS": str(tmp_path)}, stderr=-1)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    agent.send_signal(signal.SIGUSR1)
    _, shown = agent.communicate(timeout=20)
    assert (agent.returncode, shown) == (130, b"")


REQUESTED = """
import os, signal, subprocess, sys, time
from grpo_mega.parallel.stop_signal import StopRequests
stops = StopRequests()
stops.training_starts()
child = subprocess.Popen(["sleep", "2"])  # a reward worker, which must not be ended
open(os.environ["PIDS"] + "/" + os.environ["RANK"], "w").close()
while not stops.wanted():
    time.sleep(0.05)
if "FOREVER" in os.environ:
    time.sleep(60)
sys.exit(stops.wanted() if child.wait() == 0 else 1)
"""


def start_agent(folder: Path, program: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start an agent with two ranks, and wait until both have started."""
    code = f"""
import os, sys
from grpo_mega.launch.supervisor import run_ranks
env = [{{**os.environ, "RANK": str(r)}} for r in range(2)]
sys.exit(run_ranks([sys.executable, "-c", {program!r}], env))
"""
    environment = {**os.environ, "PIDS": str(folder), **environment}
    agent = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while len(list(folder.iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return agent


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_the_first_signal_of_the_terminal_or_scheduler_is_a_request_to_every_rank_and_ends_no_child(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    agent = start_agent(tmp_path, REQUESTED)
    agent.send_signal(number)
    _, shown = agent.communicate(timeout=30)
    assert agent.returncode == code, shown
    assert b"Traceback" not in shown


def test_the_second_signal_ends_ranks_that_do_not_stop(tmp_path: Path) -> None:
    agent = start_agent(tmp_path, REQUESTED, FOREVER="1")
    agent.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert agent.poll() is None
    agent.send_signal(signal.SIGINT)
    _, shown = agent.communicate(timeout=20)
    assert agent.returncode == 130, shown
    assert shown.splitlines()[-1].startswith(b"launch: interrupted on ")


def test_a_rank_that_left_before_training_does_not_leave_the_others_waiting() -> None:
    """A signal during the start can reach a rank before training and another one in it."""
    rank = "import os, sys, time; sys.exit(143) if os.environ['RANK'] == '0' else time.sleep(60)"
    code = f"""
import os, sys
from grpo_mega.launch import supervisor
supervisor._STOPPING_SECONDS = 1.0
env = [{{**os.environ, "RANK": str(r)}} for r in range(2)]
sys.exit(supervisor.run_ranks([sys.executable, "-S", "-c", {rank!r}], env))
"""
    ended = subprocess.run([sys.executable, "-c", code], timeout=40, check=False)
    assert ended.returncode == 143


def test_a_failure_on_another_machine_ends_the_ranks_with_its_code_and_message(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    port = free_port()
    begin = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(rendezvous, NodeInfo(1, 2, 1, "host1"), "127.0.0.1", port, 10.0)
        with rendezvous(NodeInfo(0, 2, 1, "host0"), "127.0.0.1", port, 10.0) as meeting:
            other = joining.result()
            Timer(0.3, other.report_failure, (2, "rank 1: sampling.top_p=2 is wrong\n")).start()
            sleeping = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
            assert run_ranks(sleeping, rank_environments(1), meeting) == 2
    assert capfdbinary.readouterr().err == b"rank 1: sampling.top_p=2 is wrong\n"
    assert time.monotonic() - begin < 30


def test_other_machines_receive_the_failure_of_this_machine() -> None:
    port = free_port()
    received: SimpleQueue[tuple[int, str]] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(rendezvous, NodeInfo(1, 2, 1, "host1"), "127.0.0.1", port, 10.0)
        with rendezvous(NodeInfo(0, 2, 1, "host0"), "127.0.0.1", port, 10.0) as meeting:
            joining.result().watch(lambda code, text: received.put((code, text)))
            failing = [sys.executable, "-S", "-c", "import sys; sys.exit('the cause')"]
            assert run_ranks(failing, rank_environments(1), meeting) == 1
    code, text = received.get(timeout=5)
    assert code == 1
    assert text.splitlines()[0].startswith("launch: the last lines of rank 0 on ")
    assert text.splitlines()[-1] == "the cause"


def test_all_ranks_get_the_commits_that_the_launcher_found(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    pins = ('model.revision="1f"',)

    def record(command: list[str], _: object, **_limits: object) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr(main, "read_request", lambda _: main.LaunchRequest(2, True, 10.0, pins))
    monkeypatch.setattr(main, "run_ranks", record)
    assert main.start("train.sh", ["run.yaml", "train.steps=2"], {}) == 0
    (command,) = commands
    assert list(command[-3:]) == ["run.yaml", "train.steps=2", *pins]


LAST_MOMENT = """
import os, signal, sys
from grpo_mega.launch import main
class Last:  # destroyed after Python has removed its signal handlers
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
        kill(pid, number)
sys.last = Last()
main.read_request = lambda arguments: main.LaunchRequest(2, True, 10.0)
main.run_ranks = lambda *_, **__: 2
sys.exit(main.main(["train.sh"]))
"""


def test_a_signal_while_an_agent_exits_does_not_change_its_exit_code() -> None:
    """Slurm sends SIGTERM to all tasks when the first one fails; the job gets the largest exit code."""
    env = {**os.environ, "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", LAST_MOMENT]
    agents = [subprocess.Popen(command, env={**env, "NODE_RANK": str(node)}) for node in range(2)]
    assert [agent.wait(timeout=30) for agent in agents] == [2, 2]


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_launcher_starts_without_torch() -> None:
    code = "import sys, grpo_mega.launch.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
