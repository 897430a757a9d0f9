"""Builds the objects of a training job on this rank: policy, critic, engine, weight sync, rewards and observer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from grpo_mega.checkpoint.export_hf import export_hf
from grpo_mega.checkpoint.manager import CheckpointManager, LoopState
from grpo_mega.config.schema import Config
from grpo_mega.data.dataset import PromptDataset
from grpo_mega.data.row_plan import RolloutCost
from grpo_mega.engines.factory import make_engine as make_configured_engine
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.interfaces import Engine, WeightSource
from grpo_mega.models.flops import attention_flops, weights_per_token
from grpo_mega.models.spec import ModelSpec
from grpo_mega.observe.atomic_files import to_json, write_atomically
from grpo_mega.observe.background_writer import BackgroundWriter
from grpo_mega.observe.log import quiet_libraries
from grpo_mega.observe.memory import PhasePeaks, device_peak
from grpo_mega.observe.progress import Progress
from grpo_mega.observe.run_folder import RunFolder, RunState
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.heartbeat import heartbeat_of_this_rank
from grpo_mega.parallel.ranks import Ranks, first_error
from grpo_mega.parallel.stop_signal import StopRequests
from grpo_mega.policy.critic import MegatronCritic
from grpo_mega.policy.policy import MegatronPolicy
from grpo_mega.rewards.base import build_rewards, full_marks
from grpo_mega.rollout.answer_times import AnswerTimes
from grpo_mega.rollout.evaluator import Evaluator
from grpo_mega.rollout.sampler import Sampler
from grpo_mega.trainer.batch import explain_batch
from grpo_mega.trainer.build_async import background_of
from grpo_mega.trainer.build_observer import Shown, make_observer, own_work
from grpo_mega.trainer.build_rollout import make_source, start_workers
from grpo_mega.trainer.build_saves import make_managers, make_saves
from grpo_mega.trainer.engine_probe import EngineProbe
from grpo_mega.trainer.engine_rebuilds import EngineRebuilds, RebuildableEngine, RebuildableSync
from grpo_mega.trainer.loop import TrainerState, evaluate, send_weights, train
from grpo_mega.trainer.mismatch_guard import MismatchGuard
from grpo_mega.trainer.objective import Objective
from grpo_mega.trainer.phases import Phases
from grpo_mega.trainer.rollback import Rollbacker, with_changed_kl
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.trainer.run_guard import RunGuard
from grpo_mega.trainer.run_trace import RunTrace
from grpo_mega.weight_sync.fp8 import Fp8Source, fp8_tensors
from grpo_mega.weight_sync.fp8_report import fp8_report, table_lines
from grpo_mega.weight_sync.sync import FullTensors, SyncSettings, WeightSync

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltJob:
    """A training job, with the objects that are used before and after the loop."""

    job: TrainerState
    run_state: RunState
    model_folder: Path
    state: LoopState
    policy: MegatronPolicy
    writer: BackgroundWriter
    rollbacker: Rollbacker

    def run(self) -> None:
        """Run the first weight sync and evaluation, the loop, the last evaluation, the export and the summary."""
        job, observer = self.job, self.job.observer
        try:
            self.rollbacker.start(self.state)
            first = send_weights(job, self.state)
            known = self.run_state.previous is not None and self.run_state.previous.eval_before is not None
            is_new = self.run_state.status == "fresh" or self.state.step == 0  # a fork starts at a later step
            before = evaluate(job, self.state) if is_new and not known else None
            observer.started(first.policy_digest, before)
            last = self.rollbacker.train_to_end(
                lambda state: train(job, state), self.state, lambda state: send_weights(job, state)
            )
            after = evaluate(job, last)
            if job.background is not None:
                job.background.close()
            if job.config.checkpoint.export_hf:
                with job.phases.reading_weights():
                    export_hf(self.policy, self.model_folder, self.run_state.folder.path / "hf", job.ranks)
            job.trace.finish()
            observer.finished(after)
        except BaseException as error:
            observer.failed(error)
            raise


@contextmanager
def building(
    config: Config,
    ranks: Ranks,
    run: RunState,
    model_folder: Path,
    prompts: PromptDataset,
    held_out: PromptDataset | None,
    stops: StopRequests,
) -> Iterator[BuiltJob]:
    """Construct all objects of a rank; on exit they are closed in reverse order. Collective.

    Args:
        config: the checked config.
        ranks: coordinates and device of this rank.
        run: the open run folder, and the checkpoint to continue from.
        model_folder: Hugging Face folder of the base model.
        prompts: training prompts.
        held_out: prompts of the evaluation; None: no evaluation.
        stops: stop requests of this process.

    Raises the errors of `MegatronPolicy`, `make_engine` and `make_sync`.
    """
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(config.train.steps, run.step + 1)) if ranks.is_first else None
        writer = stack.enter_context(BackgroundWriter())
        peaks = PhasePeaks(device_peak(ranks.device.type) if ranks.is_first and config.observe.memory_peaks else None)
        trace, timers = make_timers(RunTrace(config.observe, run.folder, ranks, stack), peaks, progress)
        with timers.phase("start"):
            spec = checkpoint_spec(model_folder)
            workers, collectives = start_workers(config, ranks, stack), ArrayCollectives(ranks)
            policy = MegatronPolicy(config, spec, model_folder, ranks, with_reference=config.needs_reference)
            phases = Phases(policy, engine_elsewhere=config.engine.placement == "server")
            critic = _make_critic(config, spec, model_folder, phases, ranks)
            checkpoints, local = make_managers(config, spec, run.folder, phases, critic, ranks, stack, prompts)
            state = _first_state(checkpoints, policy, run, prompts)
            engine = phases.start_engine(lambda: make_rebuildable_engine(config, model_folder, run.folder.logs, stack))
            with phases.reading_weights():
                sync = RebuildableSync(lambda: make_sync(config, policy, engine, ranks))
                report_fp8(config, policy, run.folder, is_first=ranks.is_first)
            answers = AnswerTimes(lambda: timers.current == "rollout", recorder=trace.recorder)
            sampler, groups = make_source(config, engine, workers, collectives, timers, model_folder, answers, prompts)
        evaluator = make_evaluator(config, sampler, held_out, collectives)
        shown = Shown(config, run, timers, peaks, progress, prompts, evaluator.is_right, spec, writer, model_folder)
        _note(progress, explain_batch(config, ranks.topology))
        cost, transfer, background = rollout_cost(spec), RolloutTransfer(collectives), background_of(groups, stack)
        job = TrainerState(
            config=config,
            ranks=ranks,
            groups=groups,
            policy=policy,
            critic=critic,
            objective=Objective(config.algorithm, config.sampling.max_tokens),
            phases=phases,
            sync=sync,
            engines=EngineRebuilds(engine, sync, phases, config.guard.max_engine_rebuilds, timers, first_error),
            saves=make_saves(config, ranks, checkpoints, stops, timers, progress, writer, local),
            evaluator=evaluator if held_out is not None else None,
            timers=timers,
            observer=make_observer(shown, ranks, stack, own_work(policy, ranks, critic, answers)),
            guard=RunGuard(config.guard, ranks),
            is_right=evaluator.is_right,
            mismatch_guard=MismatchGuard.of(config, has_experts=spec.moe is not None),
            transfer=transfer,
            cost=cost,
            trace=trace,
            background=background,
            probe=None if background is None else EngineProbe.of(engine, config, transfer, cost, timers),
        )
        yield BuiltJob(job, run, model_folder, state, policy, writer, Rollbacker.of(job, run, checkpoints, spec))


def rollout_cost(spec: ModelSpec) -> RolloutCost:
    """Return the operations of the forward pass over a rollout, by which the work of ranks and rows is balanced."""
    return RolloutCost(linear=2 * weights_per_token(spec).total, quadratic=attention_flops(spec, [1]))


def _first_state(
    checkpoints: CheckpointManager, policy: MegatronPolicy, run: RunState, prompts: PromptDataset
) -> LoopState:
    """Load the checkpoint from which the run starts, if there is one, and return the state of the loop. Collective."""
    state = LoopState() if run.checkpoint is None else checkpoints.load(policy, run.checkpoint)
    return with_changed_kl(state.over(prompts.digest, same_run=run.status == "continued"), run.changes)


def _make_critic(
    config: Config, spec: ModelSpec, model_folder: Path, phases: Phases, ranks: Ranks
) -> MegatronCritic | None:
    """Build the critic if the algorithm has one."""
    if not config.algorithm.needs_critic:
        return None
    return phases.build_critic(lambda: MegatronCritic(config, spec, model_folder, ranks))


def _note(progress: Progress | None, text: str) -> None:
    if progress is not None:
        progress.note(text)


def make_timers(trace: RunTrace, peaks: PhasePeaks, progress: Progress | None) -> tuple[RunTrace, PhaseTimer]:
    """Return the trace and the timer of the phases of this rank, which reports them to all three and the launcher."""
    heartbeat = heartbeat_of_this_rank()
    return trace, PhaseTimer(phase_listener(peaks, progress), heartbeat=heartbeat, recorder=trace.recorder)


def phase_listener(peaks: PhasePeaks, progress: Progress | None) -> Callable[[str], None]:
    """Return the function that is called at the start of each phase.

    Args:
        peaks: measures the memory of the phase.
        progress: display, if this rank has one.
    """

    def on_phase(name: str) -> None:
        peaks.phase(name)
        if progress is not None:
            progress.phase(name)

    return on_phase


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


def make_rebuildable_engine(config: Config, model_folder: Path, logs: Path, stack: ExitStack) -> RebuildableEngine:
    """Build the engine, which can be rebuilt after a failure. Arguments and errors are those of `make_engine`.

    Args:
        config: section engine.
        model_folder: holds config.json and the tokenizer.
        logs: folder for the logs of an engine's processes.
        stack: closes the engine.
    """
    engine = RebuildableEngine(lambda: make_configured_engine(config, model_folder, logs))
    stack.callback(engine.close)
    quiet_libraries()
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
