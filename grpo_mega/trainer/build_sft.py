"""Builds the objects of supervised fine-tuning on this rank: policy and observer, and the engine if there is an
evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from grpo_mega.checkpoint.manager import LoopState
from grpo_mega.config.schema import Config
from grpo_mega.data.dataset import PromptDataset
from grpo_mega.data.example_dataset import ExampleDataset
from grpo_mega.data.rollout_table import RolloutTable
from grpo_mega.models.digest import combined_digest
from grpo_mega.models.parameter_tables import keeps_float32
from grpo_mega.observe.run_folder import RunState
from grpo_mega.observe.summary import Evaluation
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.stop_signal import StopRequests
from grpo_mega.trainer.build_engine import build_engine_side, make_evaluator
from grpo_mega.trainer.build_observer import Shown, make_observer, own_work
from grpo_mega.trainer.build_policy import build_policy_side, make_instruments, make_saves
from grpo_mega.trainer.build_rollout import Workers, start_workers
from grpo_mega.trainer.built_run import BuiltRun
from grpo_mega.trainer.example_batch import explain_examples
from grpo_mega.trainer.sft_loop import EngineSide, SftState, train_on_examples
from grpo_mega.trainer.step_metrics import IsRight
from grpo_mega.weight_sync.digest_comparison import source_digests

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BuiltSft(BuiltRun):
    """A job of supervised fine-tuning, with the objects that are used before and after the loop."""

    job: SftState

    def first_digest(self) -> str:
        """Return one digest of all weights, as a weight sync does. Collective."""
        source, dtype = self.policy.source, _DTYPES[self.job.config.precision.dtype]
        dtypes = {name: torch.float32 if keeps_float32(name) else dtype for name in source.hf_shapes()}
        with self.job.phases.reading_weights():
            return combined_digest(source_digests(source.shards(), dtypes, self.policy.model_parallel_group))

    def last_digest(self) -> str:
        """Return one digest of all weights: no sync reports it without an evaluation. Collective."""
        return self.first_digest()

    def evaluate(self, state: LoopState) -> Evaluation | None:
        """Send the weights to the engines and evaluate them. Collective."""
        return None if self.job.engine_side is None else self.job.engine_side.evaluate(state)

    def train(self) -> LoopState:
        """Run the loop of sft_loop.py. Collective."""
        return train_on_examples(self.job, self.state)


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
        UserError, RuntimeError: see `build_policy_side` and `build_engine_side`.
    """
    with ExitStack() as stack:
        instruments = make_instruments(config, ranks, run, stack)
        engine_side: EngineSide | None = None
        is_right: IsRight = _never
        with instruments.timers.phase("start"):
            workers = Workers() if held_out is None else start_workers(config, ranks, stack)
            collectives = ArrayCollectives(ranks)
            # nothing shares the devices with the policy without an engine, so it stays there between the steps
            elsewhere = held_out is None or config.engine.placement == "server"
            side = build_policy_side(
                config, ranks, run, model_folder, examples.digest, stack, engine_elsewhere=elsewhere
            )
            if held_out is not None:
                sync, sampler = build_engine_side(
                    config, ranks, model_folder, run.folder, side, workers, collectives, instruments, stack
                )
                evaluator = make_evaluator(config, sampler, held_out, collectives)
                engine_side = EngineSide(config, side.phases, sync, evaluator, instruments.timers)
                is_right = evaluator.is_right
        shown = Shown(config, run, instruments, examples, is_right, side.spec)
        observer = make_observer(shown, ranks, stack, own_work(side.policy))
        instruments.note(explain_examples(config, ranks.topology, examples))
        job = SftState(
            config=config,
            ranks=ranks,
            examples=examples,
            policy=side.policy,
            phases=side.phases,
            observer=observer,
            saves=make_saves(config, ranks, side.checkpoints, stops, instruments),
            timers=instruments.timers,
            engine_side=engine_side,
        )
        yield BuiltSft(job, run, model_folder, side.state, side.policy)


def _never(table: RolloutTable) -> NDArray[np.bool_]:
    """Return False for each rollout: without an evaluation no answer is scored."""
    return np.zeros(len(table), np.bool_)
