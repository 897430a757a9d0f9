"""One rank of `grpo-mega replay`: loads the checkpoint, makes the steps again, and compares the last one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grpo_mega.checkpoint.manager import LoopState
from grpo_mega.config.schema import Config
from grpo_mega.data.rollout_values import values_of
from grpo_mega.data.row_plan import RolloutCost
from grpo_mega.formats.checkpoint_manifest import read_manifest
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.observe.history import read_lines
from grpo_mega.observe.log import configure_logging
from grpo_mega.observe.rollout_files.mismatch_column import as_stored
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.policy.critic import MegatronCritic
from grpo_mega.policy.policy import MegatronPolicy
from grpo_mega.rewards.base import build_rewards, full_marks
from grpo_mega.trainer.build import rollout_cost
from grpo_mega.trainer.build_saves import make_checkpoints
from grpo_mega.trainer.learning import LearnedStep, learn, mean_advantages
from grpo_mega.trainer.objective import Objective
from grpo_mega.trainer.phases import Phases
from grpo_mega.trainer.recorded_groups import RecordedStep, read_recorded_step
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.trainer.run_guard import RunGuard
from grpo_mega.trainer.step_metrics import update_metrics
from grpo_mega.types import StateRecords
from grpo_mega.weight_sync.fp8_report import fp8_report, table_lines

_LIST_LIMIT = 3


@dataclass(frozen=True)
class ReplayJob:
    """Objects of this rank, as `learn` needs them."""

    config: Config
    policy: MegatronPolicy
    critic: MegatronCritic | None
    phases: Phases
    timers: PhaseTimer
    guard: RunGuard
    transfer: RolloutTransfer
    cost: RolloutCost


def measure(job: dict[str, Any], config: Config, ranks: Ranks) -> None:
    """Make the steps again; rank 0 writes the comparison of the last one. Collective.

    Raises:
        UserError: rollouts or the checkpoint are damaged or missing.
        RuntimeError: a rule of `guard.rules` ended a step, or a checkpoint cannot be loaded.
    """
    configure_logging(ranks.rank, "")
    torch.use_deterministic_algorithms(config.run.deterministic)
    folder, model = RunFolder(Path(job["run"])), Path(job["model"])
    spec = checkpoint_spec(model)
    policy = MegatronPolicy(config, spec, model, ranks, with_reference=config.needs_reference)
    phases = Phases(policy)
    critic = None
    if config.algorithm.needs_critic:
        critic = phases.build_critic(lambda: MegatronCritic(config, spec, model, ranks))
    state = LoopState(step=job["first_step"] - 1)
    if job["start"] is not None:
        checkpoints = make_checkpoints(config, spec, folder.checkpoints, phases, critic, ranks)
        state = checkpoints.load(policy, Path(job["start"]))
    replayed = ReplayJob(
        config,
        policy,
        critic,
        phases,
        PhaseTimer(),
        RunGuard(config.guard, ranks),
        RolloutTransfer(ArrayCollectives(ranks)),
        rollout_cost(spec),
    )
    lines = dict(read_lines(folder.metrics))
    kl_coef = None if job["kl_coef_changed"] else state.kl_coef
    _replay_steps(replayed, folder, lines, kl_coef, state.policy_version, job, ranks)


def _replay_steps(
    job: ReplayJob,
    folder: RunFolder,
    lines: Mapping[int, Mapping[str, float]],
    kl_coef: float | None,
    policy_version: int,
    inputs: Mapping[str, Any],
    ranks: Ranks,
) -> None:
    """Make the steps of the job, compare the last one, and write the answer on rank 0. Collective."""
    config, last = job.config, int(inputs["step"])
    rewards = build_rewards(config.reward.terms)
    marks = full_marks(rewards)
    base = Objective(config.algorithm, config.sampling.max_tokens)
    job.guard.returned(
        job.guard.rollbacks, [(step, line) for step, line in lines.items() if step < inputs["first_step"]]
    )
    for step in range(int(inputs["first_step"]), last + 1):
        recorded = read_recorded_step(
            folder.rollouts_of(step),
            ranks,
            component_names=[reward.name for reward in rewards],
            num_rollouts=config.data.prompts_per_step * config.sampling.group_size,
        )
        job.guard.start_step(step)
        job.guard.check_groups(recorded.groups, lambda table: table.has_full_marks(marks))
        objective = base.at(kl_coef)
        learned = learn(job, objective, recorded.groups, step, policy_version)
        kl_coef, policy_version = objective.next_kl_coef(learned.updates), policy_version + len(learned.updates)
        job.guard.end_step(lines.get(step, {}))
    stages = [*_compare_numbers(job, recorded, learned, lines[last], ranks), _compare_update(job, folder, inputs)]
    table = _fp8_lines(job)
    if ranks.is_first:
        Path(inputs["answer"]).write_text(json.dumps({"stages": stages, "fp8": table}))


def _compare_numbers(
    job: ReplayJob, recorded: RecordedStep, learned: LearnedStep, line: Mapping[str, float], ranks: Ranks
) -> list[dict[str, Any]]:
    """Compare log-probs, advantages, loss and gradient; the result counts on rank 0. Collective."""
    advantages = mean_advantages(job, learned.batch)
    stages = []
    if ranks.is_first:
        known, ours = recorded.old_log_probs, learned.old_log_probs
        sampled = recorded.groups.tokens.on_loss_tokens(recorded.groups.tokens.sampler_log_probs)
        ours = ours.with_values(as_stored(ours.values, values_of(sampled, ours.ids)))
        both = np.intersect1d(known.ids, ours.ids)
        theirs = [each.by_rollout() for each in (ours, known)]
        pairs = [np.array([x for row in both.tolist() for x in values[row]], np.float64) for values in theirs]
        stages = [
            _compared("log-probs", pairs[0], pairs[1], f"{len(pairs[0])} tokens of {len(both)} rollouts"),
            _compared("advantages", advantages, recorded.advantages, f"{len(advantages)} rollouts"),
        ]
    numbers = update_metrics(learned.updates)
    stages += [_compared_number("loss", numbers, line, "train/loss")]
    stages += [_compared_number("gradient", numbers, line, "train/grad_norm")]
    return stages


def _compared(name: str, ours: NDArray[np.float64], theirs: NDArray[np.float64], what: str) -> dict[str, Any]:
    if not len(theirs):
        return {"name": name, "difference": None, "text": ""}
    equal = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    if equal.all():
        return {"name": name, "difference": 0.0, "text": what}
    difference = np.nan_to_num(np.abs(ours - theirs), nan=np.inf)
    largest = float(difference.max() / max(float(np.nanmax(np.abs(theirs))), 1e-30))
    text = f"{int((~equal).sum())} of {what} differ, by at most {float(difference.max()):.3g}"
    return {"name": name, "difference": largest, "text": text}


def _compared_number(name: str, numbers: Mapping[str, float], line: Mapping[str, float], metric: str) -> dict[str, Any]:
    ours, theirs = numbers.get(metric, math.nan), line.get(metric, math.nan)
    if math.isnan(ours) and math.isnan(theirs):
        return {"name": name, "difference": None, "text": f"{metric}: no update was made"}
    found = _compared(name, np.array([ours]), np.array([theirs]), "1 number")
    return found | {"text": f"{metric}={ours!r}, recorded {theirs!r}"}


def _compare_update(job: ReplayJob, folder: RunFolder, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the state with the checkpoint after the step: digests of all tensors, or weights in another layout."""
    path = folder.checkpoint_of(int(inputs["step"]))
    if folder.complete_checkpoints().get(int(inputs["step"])) is None:
        return {"name": "update", "difference": None, "text": f"{path.name} is not among the checkpoints"}
    manifest = read_manifest(path)
    if manifest is None:
        return {"name": "update", "difference": None, "text": f"{path.name} has no manifest"}
    with job.phases.checkpointing(job.policy):
        live: dict[str, Any] = dict(job.policy.live_records(with_optimizer=True))
    if job.critic is not None:
        with job.phases.checkpointing(job.critic):
            live["critic"] = job.critic.live_records(with_optimizer=True)["."]
    differing = _differing(live, manifest.tensors)
    total = sum(map(len, live.values()))
    if not differing:
        return {"name": "update", "difference": 0.0, "text": f"{total} tensors of {path.name}"}
    shown = ", ".join(differing[:_LIST_LIMIT]) + (", ..." if len(differing) > _LIST_LIMIT else "")
    if inputs["same_layout"]:
        text = f"{len(differing)} of {total} tensors of {path.name} differ: {shown}"
        return {"name": "update", "difference": math.inf, "text": text}
    return _compare_weights(job, path, Path(inputs["model"]))


def _differing(live: StateRecords, saved: StateRecords) -> list[str]:
    return [
        f"{place}/{name}" if place != "." else name
        for place, records in live.items()
        for name, record in records.items()
        if record != saved.get(place, {}).get(name)
    ]


def _compare_weights(job: ReplayJob, path: Path, model: Path) -> dict[str, Any]:
    """Compare the weights with those of the checkpoint by their largest relative difference. Collective."""
    from grpo_mega.convert.compare import open_checkpoint
    from grpo_mega.types import TensorSlice

    saved = open_checkpoint(path, model, model)
    largest, largest_of, total = 0.0, "", 0
    with job.phases.reading_weights():
        for name, tensor in job.policy.full_tensors(256 * 2**20):
            if name not in saved.shapes:
                continue  # a tied head
            wanted = torch.empty(tensor.shape, dtype=saved.dtype(name))
            saved.read_into(TensorSlice(name, (0,) * tensor.ndim, tuple(tensor.shape)), wanted)
            difference = (tensor.cpu().double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
            total += 1
            if float(difference) > largest:
                largest, largest_of = float(difference), name
    text = f"weights of {total} tensors of {path.name}; largest relative difference {largest:.2g}, {largest_of}"
    return {"name": "update", "difference": largest, "text": text}


def _fp8_lines(job: ReplayJob) -> list[str]:
    """Return the table of quantization errors, if policy or engine compute in FP8. Collective."""
    if job.config.engine.fp8 is None and job.config.precision.fp8 is None:
        return []
    with job.phases.reading_weights():
        power_of_two = job.config.engine.fp8 == "scales_power_of_two"
        return list(
            table_lines(fp8_report(job.policy.source, job.policy.model_parallel_group, power_of_two=power_of_two))
        )
