"""Start the ranks of a job: replace this process by a rank or by `srun`, or start ranks and supervise them.

This module sets the environment of every rank: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. It imports no torch and reads no config itself (`grpo_mega.train --for-launcher` does), so that a wrong
argument is reported at once. The exit code is that of the rank that failed first; the message of that rank is the last
one on the screen. Tests: tests/unit/launch/test_main.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from grpo_mega.launch.node import Node
from grpo_mega.launch.rendezvous import NodeInfo, RendezvousError, rendezvous
from grpo_mega.launch.restarts import run_with_restarts, take_restarts
from grpo_mega.launch.slurm_variables import in_step, positive_int, slurm_step
from grpo_mega.launch.stall_watch import StallLimits
from grpo_mega.launch.supervisor import run_ranks
from grpo_mega.parallel.ports import free_port, port_is_free
from grpo_mega.types import UserError

Place = Literal["worker", "slurm_step", "slurm_allocation", "machine"]

_DEFAULT_PORT = 29500  # torchrun's default: machines that are started by hand must agree on a port


def find_place(env: Mapping[str, str]) -> Place:
    """Detect from the environment how this process was started."""
    if "RANK" in env and "WORLD_SIZE" in env:
        return "worker"
    if in_step(env):
        return "slurm_step"
    return "slurm_allocation" if "SLURM_JOB_ID" in env else "machine"


def ranks_per_node(world_size: int, num_nodes: int) -> int:
    """Return the number of ranks of each node.

    Raises:
        UserError: num_nodes does not divide world_size.
    """
    if world_size % num_nodes:
        raise UserError(
            f"run.world_size={world_size} must be a multiple of the number of nodes, {num_nodes}",
            remedy=f"use a multiple of {num_nodes}, or another number of nodes",
        )
    return world_size // num_nodes


def master_port(env: Mapping[str, str], default: int, *, hosted_here: bool) -> int:
    """Return the user's MASTER_PORT, or `default` if it is unset.

    Raises:
        UserError: it is not a port, or this machine hosts it and another program uses it.
    """
    port = positive_int(env, "MASTER_PORT", default)
    if port > 65535:
        raise UserError(f"MASTER_PORT={port} must be at most 65535", remedy="choose another, or leave it unset")
    if hosted_here and not port_is_free(port):
        raise UserError(f"MASTER_PORT={port} is in use on this machine", remedy="choose another, or leave it unset")
    return port


def machine_node(env: Mapping[str, str], world_size: int) -> Node:
    """Return this machine's part of a job that the user starts by hand with NNODES, NODE_RANK and MASTER_ADDR."""
    num_nodes = positive_int(env, "NNODES", 1)
    node_rank = positive_int(env, "NODE_RANK", 0 if num_nodes == 1 else None, least=0)
    if node_rank >= num_nodes:
        raise UserError(f"NODE_RANK={node_rank} must be below NNODES={num_nodes}", remedy="the first machine is 0")
    if num_nodes > 1 and not env.get("MASTER_ADDR"):
        raise UserError(
            f"MASTER_ADDR=(unset) must be set with NNODES={num_nodes}", remedy="use the address of machine 0"
        )
    address = env.get("MASTER_ADDR") or "127.0.0.1"
    default = free_port() if num_nodes == 1 else _DEFAULT_PORT
    port = master_port(env, default, hosted_here=node_rank == 0)
    return Node(num_nodes, node_rank, ranks_per_node(world_size, num_nodes), address, port)


def first_slurm_address(env: Mapping[str, str]) -> str:
    """Return an address of the Slurm step's first node that all its nodes can resolve."""
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    name = listed.stdout.split()[0]
    try:
        socket.getaddrinfo(name, None)
    except OSError:  # the name of a node may differ from its host name; Slurm knows its address
        shown = subprocess.run(["scontrol", "show", "node", name], capture_output=True, text=True, check=True)
        found = re.search(r"NodeAddr=(\S+)", shown.stdout)
        return found.group(1) if found else name
    return name


def slurm_port(env: Mapping[str, str]) -> int:
    """Return a port that is equal on all nodes of a step and differs for the next step and after a requeue.

    It lies below the range of ephemeral ports.
    """
    start = int(env["SLURM_JOB_ID"]) * 31 + int(env["SLURM_STEP_ID"]) + 7 * int(env.get("SLURM_RESTART_COUNT", "0"))
    return 20000 + start % 10000


def slurm_node(env: Mapping[str, str], world_size: int) -> tuple[Node, int | None]:
    """Return this task's node inside a Slurm step, and its local rank; None if the task is the agent of its node.

    With one task per node the task is an agent, even if each node has one rank.

    Raises:
        UserError: the step has neither one task per node nor one per rank, or its nodes have different numbers.
    """
    step = slurm_step(env)
    if step.num_tasks not in (step.num_nodes, world_size):
        raise UserError(
            f"run.world_size={world_size}, but this Slurm step has {step.num_tasks} tasks on {step.num_nodes} nodes",
            remedy=f"start srun with --ntasks={world_size}, or with --ntasks-per-node=1",
        )
    if len(set(step.tasks_per_node)) > 1:
        counts = ", ".join(map(str, step.tasks_per_node))
        raise UserError(
            f"this Slurm step has {counts} tasks on its nodes: every node must have the same number of ranks",
            remedy="use --ntasks-per-node, and nodes with the same number of GPUs",
        )
    address = env.get("MASTER_ADDR") or first_slurm_address(env)
    port = master_port(env, slurm_port(env), hosted_here=step.task == 0)
    node = Node(step.num_nodes, step.node_rank, ranks_per_node(world_size, step.num_nodes), address, port)
    return node, None if step.one_task_per_node else step.local_task


def srun_command(env: Mapping[str, str], script: str, arguments: Sequence[str], timeout_seconds: float) -> list[str]:
    """Return the command that starts one task per node of the allocation.

    `--cpu-bind=none`: the task's cores are for all ranks of the node. `--wait` limits the time after the first task
    exits: srun does not learn of a task that was lost with its node if the node returns before Slurm misses it.
    """
    nodes = env.get("SLURM_JOB_NUM_NODES") or env["SLURM_NNODES"]
    options = [
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        "--cpu-bind=none",
        "--kill-on-bad-exit=1",
        f"--wait={math.ceil(timeout_seconds)}",
    ]
    return ["srun", *options, script, *arguments]


@dataclass(frozen=True)
class LaunchRequest:
    """The values of the config that the launcher needs. `configured`: the config sets `world_size` itself.

    `overrides` name the commits of models and data sets of a hub, so that all ranks use the same.
    """

    world_size: int
    configured: bool
    timeout_seconds: float
    overrides: tuple[str, ...] = ()
    resume: str = "auto"
    phase_limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def limits(self) -> StallLimits:
        """Limits of ranks without progress."""
        return StallLimits(self.timeout_seconds, self.phase_limits)


def read_request(arguments: Sequence[str]) -> LaunchRequest:
    """Read the values from the config in a subprocess, which also fetches models and data sets of a hub.

    Raises:
        SystemExit: the config is wrong; the subprocess has printed the message.
    """
    command = [sys.executable, "-m", "grpo_mega.train", "--for-launcher", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.returncode)
    return LaunchRequest(**json.loads(result.stdout.splitlines()[-1]))


def replace_process(command: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """Replace this process by the command, which then receives signals and gives the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], list(command), dict(env))  # noqa: S606 - no shell is wanted


def start(script: str, arguments: Sequence[str], env: Mapping[str, str], restarts: int = 0) -> int:
    """Start this process's part of the job. Return the exit code, unless another program replaces this process.

    `restarts`: for the launchers that srun starts on the nodes of an allocation.

    Raises:
        UserError: a setting is wrong, or a restart would not continue the run.
        RendezvousError: not all machines joined.
    """
    worker = [sys.executable, "-m", "grpo_mega.train", *arguments]
    place = find_place(env)
    if place == "worker":
        replace_process(worker, env)
    request = read_request(arguments)
    if restarts and request.resume != "auto":
        raise UserError(
            f"--restarts={restarts} with checkpoint.resume={request.resume}: a restart would not continue the run",
            remedy="leave one of them out",
        )
    arguments, worker = [*arguments, *request.overrides], [*worker, *request.overrides]
    local_rank: int | None = None
    if place == "slurm_allocation":
        if request.configured:  # else each node counts its own GPUs: this may be a login node without any
            nodes = positive_int(env, "SLURM_JOB_NUM_NODES", positive_int(env, "SLURM_NNODES", 1))
            ranks_per_node(request.world_size, nodes)
        again = ["--restarts", str(restarts)] if restarts else []
        replace_process(srun_command(env, script, [*arguments, *again], request.timeout_seconds), env)
    if place == "slurm_step":
        node, local_rank = slurm_node(env, request.world_size)
    else:
        node = machine_node(env, request.world_size)
    if local_rank is not None:
        replace_process(worker, {**env, **node.rank_environment(local_rank)})
    environments = node.environments(env)
    if node.num_nodes == 1:
        return run_ranks(worker, environments, limits=request.limits)
    me = NodeInfo(node.node_rank, node.num_nodes, node.num_ranks, socket.gethostname())
    with rendezvous(me, node.master_addr, node.master_port, request.timeout_seconds) as meeting:
        # srun sends SIGTERM to the other tasks when one has failed: keep the exit code that was already received
        signal.signal(signal.SIGTERM, lambda *_: None)
        code = run_ranks(worker, environments, meeting, request.limits)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python removes its own handlers while it exits
    return code


def main(argv: Sequence[str]) -> int:
    """Run the launcher. `argv`: the path of launch/train.sh, which srun starts on the nodes; CONFIG; overrides;
    `--restarts N`."""
    try:
        restarts, arguments = take_restarts(argv[1:])
        return run_with_restarts(lambda rest: start(argv[0], rest, os.environ, restarts), arguments, restarts)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except RendezvousError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:  # during the rendezvous
        return 130
