"""Simulates the steps of a planned run for `grpo-mega plan --lengths` (cli/plan.py).

Reads the lengths, and plans the run for each split of its devices into policy and engine servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grpo_mega.config.load import load_config
from grpo_mega.config.schema import Config
from grpo_mega.planner.plan import ResourcePlan
from grpo_mega.planner.simulation.comparison import (
    OVERSUBMITS,
    STALENESS_STEPS,
    Simulation,
    simulate_asynchronous,
    simulate_colocated,
)
from grpo_mega.planner.simulation.costs import EngineCost, PolicyCost
from grpo_mega.planner.simulation.lengths import (
    LOGNORMAL,
    AnswerLengths,
    lognormal_lengths,
    recorded_lengths,
    text_lengths,
)
from grpo_mega.planner.simulation.partial import PartialSettings
from grpo_mega.planner.simulation.workload import SimulatedJob, SimulatedMode
from grpo_mega.types import UserError

_DEFAULT_PARTIAL_STEPS = 8  # `sampling.partial.max_staleness` if the config has none, in steps


def simulated_steps(
    plan: ResourcePlan, lengths: AnswerLengths, path: Path, overrides: Sequence[str], plan_of: PlanOf
) -> Simulation:
    """Simulate synchronous, partial and asynchronous steps of a run.

    Args:
        plan: plan of the run.
        lengths: lengths of its answers.
        path: its config.
        overrides: `section.key=value` overrides of the config.
        plan_of: returns the plan of a config.
    """
    config, notes = plan.inputs.config, list[str]()
    settings: list[PartialSettings] = []
    if plan.inputs.uses_servers:
        notes.append("partial: not simulated, engine.placement=server does not support it")
    elif config.sampling.max_tokens < 2:
        notes.append("partial: not simulated, sampling.max_tokens=1 is a single slice")
    else:
        settings = partial_settings(config)
    synchronous, partial = simulate_colocated(job_of(plan, lengths), settings)
    asynchronous = list[SimulatedMode]()
    if config.engine.kind != "vllm" or config.engine.dp > 1:
        notes.append("asynchronous: not simulated, engine servers need engine.kind=vllm and engine.dp=1")
    else:
        for split in server_plans(plan, path, overrides, plan_of):
            asynchronous += simulate_asynchronous(job_of(split, lengths), staleness_bounds(config))
        if not asynchronous:
            notes.append("asynchronous: no split of the devices into policy and engine servers fits")
    return Simulation(lengths, synchronous, partial, asynchronous, notes)


def job_of(plan: ResourcePlan, lengths: AnswerLengths) -> SimulatedJob:
    """Return the job of a plan, with the planner's times. Prompts have the length that the planner assumes."""
    inputs, topology = plan.inputs, plan.inputs.topology
    prompt_tokens = max(1, round(inputs.config.data.max_prompt_tokens * inputs.assumptions.mean_length))
    mean_tokens = prompt_tokens + lengths.summary().mean
    return SimulatedJob(
        lengths,
        prompt_tokens,
        inputs.config.data.prompts_per_step,
        inputs.config.sampling.group_size,
        inputs.config.train.updates_per_step,
        topology.num_prompt_shards,
        EngineCost.planned(inputs, plan.memory.engine, mean_tokens),
        PolicyCost.planned(inputs, plan.time),
        topology.world_size,
        topology.num_server_ranks,
    )


def partial_settings(config: Config) -> list[PartialSettings]:
    """Return the settings to compare: those of the config with several values of `oversubmit`."""
    sampling, given = config.sampling, config.sampling.partial
    bound = _DEFAULT_PARTIAL_STEPS * config.train.updates_per_step if given is None else given.max_staleness
    values = sorted({*OVERSUBMITS, *(() if given is None else (given.oversubmit,))})
    return [PartialSettings(value, sampling.slice_tokens, bound) for value in values]


def staleness_bounds(config: Config) -> list[int]:
    """Return the values of `train.max_staleness` to compare: 1, 2 and 4 steps, and that of the config."""
    given = {config.train.max_staleness} - {0}
    return sorted({steps * config.train.updates_per_step for steps in STALENESS_STEPS} | given)


PlanOf = Callable[[Config], ResourcePlan]


def server_plans(plan: ResourcePlan, path: Path, overrides: Sequence[str], plan_of: PlanOf) -> Iterator[ResourcePlan]:
    """Yield a plan for each split of the run's devices into policy and engine servers that fits.

    Nodes are split as a whole; a single node is split by device. All devices are used, and the number of servers must
    divide the ranks of the policy.

    Args:
        plan: plan of the run on all of its devices.
        path: its config.
        overrides: `section.key=value` overrides of the config.
        plan_of: returns the plan of a config.
    """
    topology, per_node = plan.inputs.topology, plan.inputs.gpu.per_node
    total = topology.world_size + topology.num_server_ranks
    unit = per_node if total > per_node else 1
    for ranks in range(unit, total, unit):
        num_servers, left = divmod(total - ranks, topology.engine_size)
        if left or ranks % num_servers:
            continue
        urls = ",".join(f"server-{i}:7700" for i in range(num_servers))
        changes = ["sampling.partial=null", "engine.placement=server", f"engine.urls=[{urls}]"]
        try:
            split = plan_of(load_config(path, [*overrides, *changes, f"run.world_size={ranks}"]))
        except UserError:  # the layout does not divide these ranks
            continue
        if split.fits:
            yield split


def read_lengths(given: str, max_tokens: int) -> AnswerLengths:
    """Return the source that `--lengths` names.

    Args:
        given: `lognormal:MU,SIGMA`, a text file, a Parquet part, the folder of a step's rollouts, or that of a run.
        max_tokens: `sampling.max_tokens`.

    Raises:
        UserError: MU or SIGMA is not allowed, or the file was not found, cannot be read, or has no lengths.
    """
    if given.startswith(LOGNORMAL):
        return lognormal_lengths(given, max_tokens)
    path = Path(given)
    if not path.exists():
        raise UserError(
            f"--lengths={given} was not found",
            remedy="name a file with one length per line, a folder of rollouts, or lognormal:MU,SIGMA",
        )
    if path.is_dir() or path.suffix == ".parquet":
        return recorded_lengths(given, list(_recorded_rows(path)), max_tokens)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--lengths={given} cannot be read as text: {error}", remedy="name a file with one length per line"
        ) from None
    return text_lengths(given, text, max_tokens)


def _recorded_rows(path: Path) -> Iterator[NDArray[np.int64]]:
    """Yield the lengths of each group of recorded rollouts."""
    import pyarrow.compute as pc

    from grpo_mega.observe.rollout_files.reader import read_step, steps_of
    from grpo_mega.observe.run_folder import RunFolder

    folder = RunFolder(path)
    folders = [path]
    if folder.rollouts.is_dir():
        folders = [folder.rollouts_of(step) for step in steps_of(folder.rollouts)]
    for each in folders:
        found = read_step(each, ["group", "completion_ids"])
        if found.problems:
            raise UserError(f"--lengths={path}: {found.problems[0]}", remedy="name another step of the run")
        groups = found.table["group"].to_numpy()
        lengths = pc.list_value_length(found.table["completion_ids"]).to_numpy().astype(np.int64)
        for group in np.unique(groups):
            yield lengths[groups == group]
