"""The environment variables that Slurm sets for a task. Imports no torch: the launcher starts without it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from grpo_mega.types import UserError

# Steps that srun does not start (batch script, interactive shell) have the highest step numbers.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


def positive_int(env: Mapping[str, str], key: str, default: int | None = None, *, least: int = 1) -> int:
    """Read an integer >= `least` from the environment.

    Raises:
        UserError: the variable is unset without a default, or has another value.
    """
    text = env.get(key, "" if default is None else str(default))
    if not text.isdecimal() or int(text) < least:
        raise UserError(
            f"{key}={text or '(unset)'} must be a whole number >= {least}", remedy="set it in the environment"
        )
    return int(text)


@dataclass(frozen=True)
class SlurmStep:
    """A task of a step that srun started: its numbers, and the number of tasks on each node."""

    task: int
    local_task: int
    node_rank: int
    num_tasks: int
    num_nodes: int
    tasks_per_node: tuple[int, ...]

    @property
    def one_task_per_node(self) -> bool:
        """True if the task is the agent of its node, even if each node has one rank."""
        return self.num_tasks == self.num_nodes


def in_step(env: Mapping[str, str]) -> bool:
    """Return True inside a step that srun started, and False in a batch script or an interactive shell."""
    return "SLURM_PROCID" in env and int(env.get("SLURM_STEP_ID", _FIRST_SPECIAL_STEP)) < _FIRST_SPECIAL_STEP


def slurm_step(env: Mapping[str, str]) -> SlurmStep:
    """Read the variables of a task.

    Raises:
        UserError: a variable that Slurm always sets is missing or is not a number.
    """
    num_tasks = positive_int(env, "SLURM_STEP_NUM_TASKS", positive_int(env, "SLURM_NTASKS", 1))
    num_nodes = positive_int(env, "SLURM_STEP_NUM_NODES", positive_int(env, "SLURM_NNODES", 1))
    spread = env.get("SLURM_STEP_TASKS_PER_NODE") or f"{num_tasks // num_nodes}(x{num_nodes})"
    return SlurmStep(
        task=positive_int(env, "SLURM_PROCID", least=0),
        local_task=positive_int(env, "SLURM_LOCALID", 0, least=0),
        node_rank=positive_int(env, "SLURM_NODEID", 0, least=0),
        num_tasks=num_tasks,
        num_nodes=num_nodes,
        tasks_per_node=tasks_per_node(spread),
    )


def tasks_per_node(text: str) -> tuple[int, ...]:
    """Expand Slurm's short form: `2(x3),1` gives (2, 2, 2, 1)."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text} must have the form that Slurm uses, for example 2(x3),1")
        found += [int(match[1])] * int(match[2] or 1)
    return tuple(found)
