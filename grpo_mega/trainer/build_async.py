"""Builds the sampler of runs whose engine servers sample while the policy trains (`train.max_staleness`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from grpo_mega.config.schema import Config
from grpo_mega.data.answer_text import answer_text
from grpo_mega.data.chat import load_tokenizer
from grpo_mega.data.dataset import PromptDataset
from grpo_mega.environments.pool import EnvironmentPool, ReplyErrors
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.rollout.answer_times import AnswerTimes
from grpo_mega.rollout.async_sampler import AsyncSampler
from grpo_mega.rollout.background_sampler import BackgroundSampler
from grpo_mega.rollout.carried_rollouts import CarriedRollouts
from grpo_mega.rollout.dynamic_sampling import GroupSource
from grpo_mega.rollout.multi_turn import MultiTurnGenerator, broadcast_within
from grpo_mega.rollout.partial_sampler import numbered_prompts
from grpo_mega.rollout.rollout_buffer import BufferLimits, RolloutBuffer
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.rollout.sampler import Sampler
from grpo_mega.rollout.slices import SliceSampler
from grpo_mega.rollout.staleness import StalenessLimit
from grpo_mega.trainer.engine_rebuilds import RebuildableEngine
from grpo_mega.types import Completion, Prompt, Rollout, SamplingRequest

_LONGEST_BEAT_SECONDS = 10.0


@dataclass(frozen=True)
class BackgroundGenerator:
    """Samples on this rank's server without the other ranks. Setting `cancelled` ends a call with an error."""

    engine: RebuildableEngine
    cancelled: threading.Event = field(default_factory=threading.Event)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample; the contract is `Engine.generate`."""
        return self.engine.generate_on_this_rank(prompts, sampling, on_completion, is_cancelled=self.cancelled.is_set)


def make_async_sampler(
    config: Config,
    engine: RebuildableEngine,
    environments: EnvironmentPool | None,
    sampler: Sampler,
    dialogue: MultiTurnGenerator | None,
    prompts: PromptDataset,
    timers: PhaseTimer,
    model_folder: Path,
    answers: AnswerTimes,
) -> AsyncSampler:
    """Build the sampler of training rollouts, which scores with the reward workers of `sampler`.

    Args:
        config: sections sampling, train, algorithm, engine, data and guard.
        engine: of this rank.
        environments: environment workers of this rank.
        sampler: sampler of this rank for evaluations.
        dialogue: generator of rollouts with several turns; None: rollouts have one answer.
        prompts: training prompts.
        timers: timer of the phase `reward`.
        model_folder: holds the tokenizer.
        answers: collects the gauges of the engine.
    """
    ranks, size = sampler.collectives.ranks, config.sampling.group_size
    text_of = partial(answer_text, load_tokenizer(model_folder))
    prompt_of = numbered_prompts(prompts, config.data.prompts_per_step, config.run.seed)

    def is_degenerate(rollouts: Sequence[Rollout]) -> bool:
        return bool(SampledGroups.of(rollouts, size).degenerate[0])

    def make_background(carried: CarriedRollouts) -> BackgroundSampler:
        generator, quota = BackgroundGenerator(engine), carried.shard.quota
        limits = BufferLimits(
            quota,
            size,
            StalenessLimit(config.train.max_staleness, config.train.updates_per_step),
            max_discarded=quota * (config.algorithm.refill_rounds or 0),
        )
        alone = None if dialogue is None else replace(dialogue, broadcast=broadcast_within(None, ranks.rank))
        slices = SliceSampler(generator, config.background_slice_tokens, config.engine.max_num_seqs, text_of, alone)
        background = BackgroundSampler(
            RolloutBuffer(carried, limits, prompt_of, is_degenerate),
            slices,
            sampler.scoring,
            engine.take_gauges,
            generator.cancelled,
        )
        timers.count_progress(lambda: background.num_calls)
        return background

    def add_gauges(gauges: EngineGauges) -> None:
        answers.add_gauges(gauges, ReplyErrors() if environments is None else environments.take_errors())

    return AsyncSampler(
        make_background if ranks.at.engine_tp_rank == 0 else None,
        sampler.collectives,
        timers,
        config,
        prompt_of,
        lambda: engine.policy_version,
        add_gauges,
        sampler.component_names,
        min(_LONGEST_BEAT_SECONDS, config.guard.timeout_seconds / 4),
    )


def background_of(groups: GroupSource, stack: ExitStack) -> AsyncSampler | None:
    """Return the sampler of a run that samples during training, or None; `stack` closes it before the engine."""
    if not isinstance(groups.partial, AsyncSampler):
        return None
    stack.callback(groups.partial.close)
    return groups.partial
