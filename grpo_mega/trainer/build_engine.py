"""Builds the engine side of a training job: the engine, its weight sync with the policy, and the evaluator."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from grpo_mega.config.schema import Config
from grpo_mega.data.dataset import PromptDataset
from grpo_mega.engines.factory import make_engine as make_configured_engine
from grpo_mega.interfaces import Engine, WeightSource
from grpo_mega.observe.atomic_files import to_json, write_atomically
from grpo_mega.observe.log import quiet_libraries
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.policy.policy import MegatronPolicy
from grpo_mega.rewards.base import build_rewards, full_marks
from grpo_mega.rollout.answer_times import AnswerTimes
from grpo_mega.rollout.evaluator import Evaluator
from grpo_mega.rollout.sampler import Sampler
from grpo_mega.trainer.build_policy import Instruments, PolicySide
from grpo_mega.trainer.build_rollout import Workers, make_sampler
from grpo_mega.weight_sync.fp8 import Fp8Source, fp8_tensors
from grpo_mega.weight_sync.fp8_report import fp8_report, table_lines
from grpo_mega.weight_sync.sync import FullTensors, SyncSettings, WeightSync

log = logging.getLogger(__name__)


def build_engine_side(
    config: Config,
    ranks: Ranks,
    model_folder: Path,
    folder: RunFolder,
    side: PolicySide,
    workers: Workers,
    collectives: ArrayCollectives,
    instruments: Instruments,
    stack: ExitStack,
    answers: AnswerTimes | None = None,
) -> tuple[WeightSync, Sampler]:
    """Start the engine, and connect it with the policy. Collective.

    Args:
        config: the checked config.
        ranks: coordinates of this rank.
        model_folder: holds config.json and the tokenizer.
        folder: the run folder.
        side: the policy of this rank.
        workers: reward and environment workers of this rank.
        collectives: of this rank.
        instruments: timers of the sampler.
        stack: closes the engine.
        answers: collects the times of this rank's rollouts; None: they are not measured.

    Raises:
        UserError, RuntimeError: see `make_engine` and `make_sync`.
    """
    engine = side.phases.start_engine(lambda: make_engine(config, model_folder, folder.logs, stack))
    quiet_libraries()
    with side.phases.reading_weights():
        sync = make_sync(config, side.policy, engine, ranks)
        report_fp8(config, side.policy, folder, is_first=ranks.is_first)
    return sync, make_sampler(config, engine, workers, collectives, instruments.timers, model_folder, answers)


def make_engine(config: Config, model_folder: Path, logs: Path, stack: ExitStack) -> Engine:
    """Build the engine; `stack` closes it.

    Args:
        config: section engine.
        model_folder: holds config.json and the tokenizer.
        logs: folder for the logs of an engine's processes.
        stack: closes the engine.

    Raises:
        UserError, RuntimeError: see `engines.factory.make_engine`.
    """
    engine = make_configured_engine(config, model_folder, logs)
    stack.callback(engine.close)
    return engine


def make_evaluator(
    config: Config, sampler: Sampler, held_out: PromptDataset | None, collectives: ArrayCollectives
) -> Evaluator:
    """Return the evaluator of the held-out sets; without any, it only tells which rewards mean a right answer.

    Args:
        config: sections evaluation, sampling, run and reward.
        sampler: of this rank.
        held_out: prompts of the evaluation, or None.
        collectives: of this rank.
    """
    return Evaluator(
        sampler,
        held_out.sets if held_out is not None else (),
        config.evaluation,
        config.evaluation.max_tokens or config.sampling.max_tokens,
        config.run.seed,
        full_marks(build_rewards(config.reward.terms)),
        collectives.sum,
    )


def make_sync(config: Config, policy: MegatronPolicy, engine: Engine, ranks: Ranks) -> WeightSync:
    """Collective: connect the policy with its engines.

    All ranks create the process groups of all engine replicas here, in the same order.

    Args:
        config: gives bucket size in bytes, transport and timeout in seconds.
        policy: of this rank.
        engine: of this rank.
        ranks: coordinates of this rank.

    Raises:
        UserError: the transport is not available on this machine.
        WeightMismatchError: the tensors of policy and engine do not match (names them).
        RuntimeError: ranks made different plans, or an engine server did not connect in time.
    """
    replicas = [ranks.topology.replica_ranks(i) for i in range(ranks.topology.num_replicas)]
    groups = [dist.new_group(members) for members in replicas]
    settings = SyncSettings(config.weight_sync.bucket_bytes, config.guard.timeout_seconds, config.weight_sync.transport)
    where = ranks.topology.describe(ranks.rank)
    source, full_tensors = policy_end(config, policy)
    peers = engine.sync_peers(
        source.hf_shapes(), where, bucket_bytes=settings.bucket_bytes, transport=settings.transport
    )
    return WeightSync(
        source,
        full_tensors,
        engine.sink,
        source_group=policy.model_parallel_group,
        replicas=replicas if peers is None else peers.replicas,
        replica_group=groups[ranks.at.replica],
        settings=settings,
        where=where,
        world=None if peers is None else peers.group,
        announce=None if peers is None else peers.announce,
    )


def policy_end(config: Config, policy: MegatronPolicy) -> tuple[WeightSource, FullTensors]:
    """Return the source of a weight sync, by slices and by full tensors: weights, or quantized values and scales."""
    if config.engine.fp8 is None:
        return policy.source, policy.full_tensors
    power_of_two = config.engine.fp8 == "scales_power_of_two"
    coded = fp8_tensors(policy.full_tensors, power_of_two=power_of_two)
    return Fp8Source(policy.source, power_of_two=power_of_two), coded


def report_fp8(config: Config, policy: MegatronPolicy, folder: RunFolder, *, is_first: bool) -> None:
    """Write fp8_report.json and log it as a table, if `weight_sync.fp8_report` is set. Collective.

    Args:
        config: gives the form of the scales.
        policy: whose matrices are quantized for the report.
        folder: the run folder.
        is_first: True on the rank that writes.
    """
    if not config.weight_sync.fp8_report:
        return
    power_of_two = config.engine.fp8 == "scales_power_of_two"
    report = fp8_report(policy.source, policy.model_parallel_group, power_of_two=power_of_two)
    if is_first:
        write_atomically(folder.fp8_report, to_json(report, indent=2))
        log.info("quantization error of the policy's matrices in FP8:\n%s", "\n".join(table_lines(report)))
