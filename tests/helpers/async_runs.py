"""A run on scripted engines that samples in the background, for tests with ranks as threads or as processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from grpo_mega.config.schema import Config
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.rollout.async_sampler import AsyncSampler
from grpo_mega.rollout.background_sampler import BackgroundSampler
from grpo_mega.rollout.carried_rollouts import CarriedRollouts
from grpo_mega.rollout.dynamic_sampling import GroupSource
from grpo_mega.rollout.partial_sampler import numbered_prompts
from grpo_mega.rollout.rollout_buffer import BufferLimits, RolloutBuffer
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.rollout.scoring import RolloutScoring
from grpo_mega.rollout.slices import SliceSampler
from grpo_mega.rollout.staleness import StalenessLimit
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from tests.helpers.planner_cases import config_of
from tests.helpers.scripted_slices import RandomEngine, RecordingScorer, random_lengths

PER_STEP, SIZE, UPDATES = 4, 2, 2
STALENESS = 2 * UPDATES


def config() -> Config:
    return config_of(
        sampling={"group_size": SIZE, "max_tokens": 60},
        data={"prompts_per_step": PER_STEP},
        train={"minibatches_per_epoch": UPDATES, "max_staleness": STALENESS},
        engine={"placement": "server", "urls": ["h:1"]},
        algorithm={"correction": "token_truncated"},
    )


class ScriptedServer(RandomEngine):
    """Engine that counts its calls, and fails if a call overlaps a change of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.cancelled = threading.Event()
        self.hook: Callable[[], None] = lambda: None

    def generate(self, *arguments: Any) -> Any:
        version = self.policy_version
        self.hook()
        found = super().generate(*arguments)
        time.sleep(0.001)
        assert self.policy_version == version, "the weights have changed during a call"
        return found


class AsyncRun:
    """The part of a run on one rank, whose server samples in another thread."""

    def __init__(self, transfer: RolloutTransfer, timers: PhaseTimer | None = None, slice_tokens: int = 4) -> None:
        timers = timers or PhaseTimer()
        self.engine, settings, data, at = ScriptedServer(), config(), random_lengths(), transfer.ranks.at
        self.scorer = RecordingScorer(SIZE)
        scoring = RolloutScoring(self.scorer, at.replica)
        prompt_of = numbered_prompts(data, PER_STEP, settings.run.seed)

        def make_background(carried: CarriedRollouts) -> BackgroundSampler:
            limits = BufferLimits(carried.shard.quota, SIZE, StalenessLimit(STALENESS, UPDATES))
            buffer = RolloutBuffer(carried, limits, prompt_of, lambda _: False)
            slices = SliceSampler(self.engine, slice_tokens, 64, lambda ids: f"{len(ids)}")
            background = BackgroundSampler(buffer, slices, scoring, EngineGauges, self.engine.cancelled)
            timers.count_progress(lambda: background.num_calls)
            return background

        self.sampler = AsyncSampler(
            make_background if at.engine_tp_rank == 0 else None,
            transfer.collectives,
            timers,
            settings,
            prompt_of,
            lambda: self.engine.policy_version,
            lambda _: None,
            ["exact"],
            beat_seconds=0.2,
        )
        self.source = GroupSource(None, data, settings, self.sampler)  # type: ignore[arg-type]
        self.carried: CarriedRollouts | None = None

    def sample(self, step: int) -> SampledGroups:
        groups = self.source.sample(step, carried=self.carried)
        assert groups.carry is not None
        self.carried = groups.carry.rollouts
        return groups

    def push(self) -> None:
        with self.sampler.syncing():
            self.engine.policy_version += UPDATES

    def train(self, num_steps: int) -> list[SampledGroups]:
        groups = []
        for step in range(1, num_steps + 1):
            groups.append(self.sample(step))
            time.sleep(0.01)  # training
            self.push()
        return groups
