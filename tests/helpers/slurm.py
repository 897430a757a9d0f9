"""A real Slurm on this machine: slurmctld, munged and two slurmd, started for the tests that use it.

It is installed from Debian's packages if it is missing, and ended by process id. Both nodes have the host's name and
address; SLURM_NODEID distinguishes them. `kill_node` simulates the loss of a node: SIGKILL to its slurmd, its
slurmstepds and their children.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from grpo_mega.parallel.ports import free_port
from tests.helpers.jobs import clean_environment

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "munged")
NODES = ("node1", "node2")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_CONFIG = """\
ClusterName=local
SlurmctldHost=localhost
AuthType=auth/munge
# a requeued job waits until the credentials of its lost step have expired; the default is two minutes
AuthInfo=socket={folder}/munge/socket,cred_expire={requeue_seconds}
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
ReturnToService=2
MpiDefault=none
SlurmdTimeout=15
# start the next job within a second instead of half a minute
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=5
UnkillableStepTimeout=60
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000 State=UNKNOWN
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def reason_unavailable() -> str:
    """Return the reason why Slurm cannot run on this machine; empty if it can."""
    if all(shutil.which(program, path=_PATH) for program in PROGRAMS):
        return "" if os.geteuid() == 0 else "Slurm is started by root, and this is another user"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return "Slurm is not installed, and installing it needs root and apt-get"
    return ""


def install_slurm() -> None:
    """Install Debian's slurm-wlm and munge if they are missing. In a container they start no daemons."""
    if all(shutil.which(program, path=_PATH) for program in PROGRAMS):
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "slurm-wlm", "munge"]):
        done = subprocess.run(
            ["apt-get", *command], env=quiet, stdin=-3, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"apt-get {' '.join(command)}: {done.stdout[-1000:]}{done.stderr[-1000:]}"


@dataclass(frozen=True)
class Slurm:
    """A running cluster. `env`: environment of its commands."""

    folder: Path
    env: Mapping[str, str]

    def run(
        self, *command: str, cwd: Path, timeout: float = 120, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a user's command to its end; terminate it after the timeout."""
        process = psutil.Popen(
            list(command),
            cwd=cwd,
            env={**self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            stdout, stderr = process.communicate(timeout=30)
            raise AssertionError(f"{' '.join(command)} took over {timeout} s:\n{stdout}{stderr}") from None
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def run_slurm_command(self, *command: str) -> str:
        """Run one of Slurm's commands and return its output."""
        done = subprocess.run(
            list(command), env=dict(self.env), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """Return the fields that scontrol shows for a job: JobState, Restarts, ExitCode and others."""
        shown = self.run_slurm_command("scontrol", "--oneliner", "show", "job", job).split()
        return {key: value for key, found, value in (word.partition("=") for word in shown) if found}

    def wait(self, job: str, *states: str, timeout: float) -> dict[str, str]:
        """Wait until the job is in one of the states."""
        deadline = time.monotonic() + timeout
        while (shown := self.state(job))["JobState"] not in states:
            assert time.monotonic() < deadline, (
                f"job {job} is still {shown['JobState']}, wanted {states}\n{self.logs()}"
            )
            time.sleep(0.5)
        return shown

    def wait_for_nodes(self, *states: str, timeout: float = 60) -> None:
        """Wait until every node is in one of the states, such as idle."""
        deadline = time.monotonic() + timeout
        while True:
            found = self.run_slurm_command("sinfo", "--noheader", "--Node", "--format=%t").split()
            if len(found) == len(NODES) and set(found) <= set(states):
                return
            assert time.monotonic() < deadline, f"nodes are {found}, wanted {states}\n{self.logs()}"
            time.sleep(0.2)

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node, which daemonizes itself."""
        self.run_slurm_command("slurmd", "-N", name, "-f", self.env["SLURM_CONF"])

    def kill_node(self, name: str) -> list[int]:
        """Kill the slurmd and the slurmstepds of the node and all their children. Return the process ids."""
        slurmd = psutil.Process(int((self.folder / f"slurmd-{name}.pid").read_text()))
        steps = [process for process in psutil.process_iter() if _is_step_of(process, name, self.folder)]
        lost = [slurmd, *steps]
        for step in steps:
            with suppress(psutil.NoSuchProcess):
                lost += step.children(recursive=True)
        for process in lost:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(lost, timeout=2)  # they are not children of this process: pid 1 may take longer to reap them
        return [process.pid for process in lost]

    def logs(self) -> str:
        """Return the last lines of the daemons' logs."""
        parts = []
        for path in sorted((self.folder / "log").iterdir()):
            parts.append(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}")
        return "\n".join(parts)


def _is_step_of(process: psutil.Process, node: str, folder: Path) -> bool:
    """Return True for a slurmstepd of this node, which only its open log file identifies."""
    try:
        log = str(folder / "log" / f"{node}.log")
        return process.name() == "slurmstepd" and log in [file.path for file in process.open_files()]
    except psutil.Error:
        return False


@contextmanager
def running_cluster(folder: Path, requeue_seconds: int = 5) -> Iterator[Slurm]:
    """Run a cluster of two idle nodes; end all of its processes on exit. A requeued job waits `requeue_seconds`."""
    for name in ("state", "log", "munge", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    ports: list[int] = []
    while len(ports) < 3:
        ports = sorted({*ports, free_port()})
    (folder / "slurm.conf").write_text(_CONFIG.format(folder=folder, ports=ports, requeue_seconds=requeue_seconds))
    env = {**clean_environment(), "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    cluster = Slurm(folder, env)
    try:
        _start_munge(cluster)
        cluster.run_slurm_command("slurmctld", "-f", env["SLURM_CONF"])
        for node in NODES:
            cluster.start_node(node)
        cluster.wait_for_nodes("idle")
        yield cluster
    finally:
        _end(cluster)


def _start_munge(cluster: Slurm) -> None:
    """Start munged as root with its own key, socket and log."""
    own = cluster.folder / "munge"
    (own / "key").write_bytes(os.urandom(128))
    (own / "key").chmod(0o600)
    own.chmod(0o755)
    options = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    cluster.run_slurm_command("munged", "--force", *(f"--{name}={own / file}" for name, file in options.items()))


def _end(cluster: Slurm) -> None:
    pid_files = [cluster.folder / f"slurmd-{node}.pid" for node in NODES]
    pid_files += [cluster.folder / "slurmctld.pid", cluster.folder / "munge" / "pid"]
    for node in NODES:
        with suppress(OSError, ValueError, psutil.Error):
            cluster.kill_node(node)
    for path in pid_files:
        with suppress(OSError, ValueError, psutil.Error):
            process = psutil.Process(int(path.read_text()))
            members = [process, *process.children(recursive=True)]
            for member in members:
                member.kill()  # slurmctld would take seconds to save a state that is not needed
            psutil.wait_procs(members, timeout=2)


def wait_until(condition: Callable[[], bool], timeout: float) -> None:
    """Poll the condition until it is true."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"the condition was not true within {timeout} s"
        time.sleep(0.1)
