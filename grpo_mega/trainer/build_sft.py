"""Builds the objects of supervised fine-tuning on this rank: policy and observer, and the engine if there is an
evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from grpo_mega.checkpoint.export_hf import export_hf
from grpo_mega.checkpoint.manager import LoopState
from grpo_mega.config.schema import Config
from grpo_mega.data.dataset import PromptDataset
from grpo_mega.data.example_dataset import ExampleDataset
from grpo_mega.data.rollout_table import RolloutTable
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.models.digest import combined_digest
from grpo_mega.models.parameter_tables import keeps_float32
from grpo_mega.observe.background_writer import BackgroundWriter
from grpo_mega.observe.log import quiet_libraries
from grpo_mega.observe.memory import PhasePeaks, device_peak
from grpo_mega.observe.progress import Progress
from grpo_mega.observe.run_folder import RunFolder, RunState
from grpo_mega.observe.summary import Evaluation
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.stop_signal import StopRequests
from grpo_mega.policy.policy import MegatronPolicy
from grpo_mega.trainer.build import (
    make_engine,
    make_evaluator,
    make_sync,
    make_timers,
    report_fp8,
)
from grpo_mega.trainer.build_observer import Shown, make_observer, own_work
from grpo_mega.trainer.build_rollout import make_dialogue, make_sampler, start_workers
from grpo_mega.trainer.build_saves import make_managers, make_saves
from grpo_mega.trainer.example_batch import explain_examples
from grpo_mega.trainer.phases import Phases
from grpo_mega.trainer.rollback import Rollbacker
from grpo_mega.trainer.run_guard import RunGuard
from grpo_mega.trainer.run_trace import RunTrace
from grpo_mega.trainer.sft_loop import EngineSide, SftState, train_on_examples
from grpo_mega.weight_sync.digest_comparison import source_digests

log = logging.getLogger(__name__)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BuiltSft:
    """A job of supervised fine-tuning, with the objects that are used before and after the loop."""

    job: SftState
    run_state: RunState
    model_folder: Path
    state: LoopState
    policy: MegatronPolicy
    rollbacker: Rollbacker

    def run(self) -> None:
        """Run the first evaluation, the loop, the last evaluation, the export and the summary."""
        job, observer = self.job, self.job.observer
        try:
            self.rollbacker.start(self.state)
            known = self.run_state.previous is not None and self.run_state.previous.eval_before is not None
            is_new = self.run_state.status == "fresh" or self.state.step == 0  # a fork starts at a later step
            before = self._evaluate(self.state) if is_new and not known else None
            observer.started(self._digest(), before)
            state = self.rollbacker.train_to_end(
                lambda state: train_on_examples(job, state), self.state, lambda _: None
            )
            after = self._evaluate(state)
            if job.config.checkpoint.export_hf:
                with job.phases.reading_weights():
                    export_hf(self.policy, self.model_folder, self.run_state.folder.path / "hf", job.ranks)
            digest = self._digest()
            job.trace.finish()
            observer.finished(after, digest)
        except BaseException as error:
            observer.failed(error)
            raise

    def _evaluate(self, state: LoopState) -> Evaluation | None:
        return None if self.job.engine_side is None else self.job.engine_side.evaluate(state)

    def _digest(self) -> str:
        """Return one digest of all weights, as a weight sync does. Collective."""
        source, dtype = self.policy.source, _DTYPES[self.job.config.precision.dtype]
        dtypes = {name: torch.float32 if keeps_float32(name) else dtype for name in source.hf_shapes()}
        with self.job.phases.reading_weights():
            return combined_digest(source_digests(source.shards(), dtypes, self.policy.model_parallel_group))


@contextmanager
def building_sft(
    config: Config,
    ranks: Ranks,
    run: RunState,
    model_folder: Path,
    examples: ExampleDataset,
    held_out: PromptDataset | None,
    stops: StopRequests,
) -> Iterator[BuiltSft]:
    """Construct all objects of a rank; on exit they are closed in reverse order. Collective.

    Args:
        config: the checked config.
        ranks: coordinates and device of this rank.
        run: the open run folder, and the checkpoint to continue from.
        model_folder: Hugging Face folder of the base model.
        examples: training examples.
        held_out: prompts of the evaluation; None: no evaluation, and no engine is built.
        stops: stop requests of this process.

    Raises:
        UserError, RuntimeError: see `MegatronPolicy`, `make_engine` and `make_sync`.
    """
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(config.train.steps, run.step + 1)) if ranks.is_first else None
        writer = stack.enter_context(BackgroundWriter())
        peaks = PhasePeaks(device_peak(ranks.device.type) if ranks.is_first and config.observe.memory_peaks else None)
        trace, timers = make_timers(RunTrace(config.observe, run.folder, ranks, stack), peaks, progress)
        engine_side = None
        with timers.phase("start"):
            spec = checkpoint_spec(model_folder)
            policy = MegatronPolicy(config, spec, model_folder, ranks, with_reference=False)
            # nothing shares the devices with the policy without an engine, so it stays there between the steps
            elsewhere = held_out is None or config.engine.placement == "server"
            phases = Phases(policy, engine_elsewhere=elsewhere)
            checkpoints, local = make_managers(config, spec, run.folder, phases, None, ranks, stack)
            state = LoopState() if run.checkpoint is None else checkpoints.load(policy, run.checkpoint)
            state = state.over(examples.digest, same_run=run.status == "continued")
            if held_out is not None:
                engine_side = _build_engine_side(
                    config, ranks, model_folder, run.folder, policy, phases, timers, held_out, stack
                )
        is_right = _never if engine_side is None else engine_side.evaluator.is_right
        shown = Shown(config, run, timers, peaks, progress, examples, is_right, spec, writer)
        observer = make_observer(shown, ranks, stack, own_work(policy, ranks))
        if progress is not None:
            progress.note(explain_examples(config, ranks.topology, examples))
        saves = make_saves(config, ranks, checkpoints, stops, timers, progress, writer, local)
        guard = RunGuard(config.guard, ranks)
        job = SftState(config, ranks, examples, policy, phases, saves, timers, observer, guard, engine_side, trace)
        yield BuiltSft(job, run, model_folder, state, policy, Rollbacker.of(job, run, checkpoints, spec))


def _build_engine_side(
    config: Config,
    ranks: Ranks,
    model_folder: Path,
    folder: RunFolder,
    policy: MegatronPolicy,
    phases: Phases,
    timers: PhaseTimer,
    held_out: PromptDataset,
    stack: ExitStack,
) -> EngineSide:
    """Start the engine and the reward workers, and connect the engine with the policy. Collective."""
    workers, collectives = start_workers(config, ranks, stack), ArrayCollectives(ranks)
    engine = phases.start_engine(lambda: make_engine(config, model_folder, folder.logs, stack))
    quiet_libraries()
    with phases.reading_weights():
        sync = make_sync(config, policy, engine, ranks)
        report_fp8(config, policy, folder, is_first=ranks.is_first)
    dialogue = make_dialogue(config, engine, workers, ranks, model_folder)
    sampler = make_sampler(config, engine, workers, collectives, timers, model_folder, dialogue)
    return EngineSide(config, phases, sync, make_evaluator(config, sampler, held_out, collectives), timers)


def _never(table: RolloutTable) -> NDArray[np.bool_]:
    """Return False for each rollout: without an evaluation no answer is scored."""
    return np.zeros(len(table), np.bool_)
