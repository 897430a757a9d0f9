"""Builds the objects of a GRPO job on this rank: policy, critic, engine, weight sync, rewards and observer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from grpo_mega.checkpoint.manager import LoopState
from grpo_mega.config.schema import Config
from grpo_mega.data.dataset import PromptDataset
from grpo_mega.data.row_plan import RolloutCost
from grpo_mega.models.flops import attention_flops, weights_per_token
from grpo_mega.models.spec import ModelSpec
from grpo_mega.observe.background_writer import BackgroundWriter
from grpo_mega.observe.run_folder import RunState
from grpo_mega.observe.summary import Evaluation
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.stop_signal import StopRequests
from grpo_mega.rollout.answer_times import AnswerTimes
from grpo_mega.rollout.dynamic_sampling import GroupSource
from grpo_mega.trainer.batch import explain_batch
from grpo_mega.trainer.build_engine import build_engine_side, make_evaluator
from grpo_mega.trainer.build_observer import Shown, make_observer, own_work
from grpo_mega.trainer.build_policy import build_policy_side, make_instruments, make_saves
from grpo_mega.trainer.build_rollout import start_workers
from grpo_mega.trainer.built_run import BuiltRun
from grpo_mega.trainer.loop import TrainerState, push_weights, train
from grpo_mega.trainer.mismatch_guard import MismatchGuard
from grpo_mega.trainer.objective import Objective
from grpo_mega.trainer.rollout_transfer import RolloutTransfer


@dataclass(frozen=True)
class BuiltJob(BuiltRun):
    """A GRPO job, with the objects that are used before and after the loop."""

    job: TrainerState
    writer: BackgroundWriter

    def first_digest(self) -> str:
        """Send the weights to the engines, and return their digest. Collective."""
        return push_weights(self.job, self.state).policy_digest

    def last_digest(self) -> str | None:
        """Return None: the sync of the last step has reported it."""
        return None

    def evaluate(self, state: LoopState) -> Evaluation | None:
        """Evaluate the weights that the engines have. Collective."""
        if self.job.evaluator is None:
            return None
        with self.job.phases.sampling(), self.job.timers.phase("evaluation"):
            return self.job.evaluator.evaluate()

    def train(self) -> LoopState:
        """Run the loop of loop.py. Collective."""
        return train(self.job, self.state)


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

    Raises:
        UserError, RuntimeError: see `build_policy_side` and `build_engine_side`.
    """
    with ExitStack() as stack:
        instruments = make_instruments(config, ranks, run, stack)
        timers = instruments.timers
        answers = AnswerTimes(lambda: timers.current == "rollout")
        with timers.phase("start"):
            workers, collectives = start_workers(config, ranks, stack), ArrayCollectives(ranks)
            elsewhere = config.engine.placement == "server"
            side = build_policy_side(
                config, ranks, run, model_folder, prompts.digest, stack, engine_elsewhere=elsewhere
            )
            state = side.state
            if any(change.key in ("algorithm.kl_coef", "algorithm.kl_target") for change in run.changes):
                state = replace(state, kl_coef=None)  # not the coefficient that was adapted so far
            sync, sampler = build_engine_side(
                config, ranks, model_folder, run.folder, side, workers, collectives, instruments, stack, answers
            )
        evaluator = make_evaluator(config, sampler, held_out, collectives)
        shown = Shown(config, run, instruments, prompts, evaluator.is_right, side.spec, model_folder)
        observer = make_observer(shown, ranks, stack, own_work(side.policy, side.critic, answers))
        instruments.note(explain_batch(config, ranks.topology))
        job = TrainerState(
            config=config,
            ranks=ranks,
            groups=GroupSource(sampler, prompts, config),
            policy=side.policy,
            critic=side.critic,
            objective=Objective(config.algorithm, config.sampling.max_tokens),
            phases=side.phases,
            sync=sync,
            observer=observer,
            saves=make_saves(config, ranks, side.checkpoints, stops, instruments),
            evaluator=evaluator if held_out is not None else None,
            timers=timers,
            mismatch_guard=MismatchGuard.of(config, has_experts=side.spec.moe is not None),
            transfer=RolloutTransfer(collectives),
            cost=rollout_cost(side.spec),
        )
        yield BuiltJob(job, run, model_folder, state, side.policy, instruments.writer)


def rollout_cost(spec: ModelSpec) -> RolloutCost:
    """Return the operations of the forward pass over a rollout, by which the work of ranks and rows is balanced."""
    return RolloutCost(linear=2 * weights_per_token(spec).total, quadratic=attention_flops(spec, [1]))
