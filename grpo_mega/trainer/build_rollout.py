"""Builds the sampling side of a job: reward and environment workers, the sampler, and its process groups."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from grpo_mega.config.schema import Config
from grpo_mega.data.chat import ResultText, load_tokenizer, text_with_special_tokens, token_ends
from grpo_mega.environments.base import build_environment
from grpo_mega.environments.pool import EnvironmentPool
from grpo_mega.interfaces import Engine
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.rewards.base import RewardComponent, build_rewards
from grpo_mega.rewards.pool import RewardPool
from grpo_mega.rollout.answer_times import AnswerTimes, MeasuredGenerator
from grpo_mega.rollout.multi_turn import MultiTurnGenerator, any_rank_within, broadcast_within
from grpo_mega.rollout.sampler import Generator, Sampler
from grpo_mega.types import Reward


@dataclass(frozen=True)
class Workers:
    """Worker processes of one prompt shard. Both are None on all ranks of the shard but the first.

    `environments` is also None without an environment in the config.
    """

    rewards: RewardPool | None = None
    environments: EnvironmentPool | None = None


def start_workers(config: Config, ranks: Ranks, stack: ExitStack) -> Workers:
    """Start the workers; `stack` ends them. Called before the engine allocates memory, because workers are forked."""
    if ranks.at.engine_tp_rank != 0:
        return Workers()
    reward, environment = config.reward, config.environment
    rewards = RewardPool(
        reward.terms,
        workers=reward.workers,
        timeout_seconds=reward.timeout_seconds,
        on_failure=reward.on_failure,
    )
    stack.enter_context(rewards)
    if environment is None:
        return Workers(rewards)
    environments = EnvironmentPool(
        environment, workers=environment.workers, timeout_seconds=environment.timeout_seconds
    )
    return Workers(rewards, stack.enter_context(environments))


def make_sampler(
    config: Config,
    engine: Engine,
    workers: Workers,
    collectives: ArrayCollectives,
    timers: PhaseTimer,
    model_folder: Path,
    answers: AnswerTimes | None = None,
) -> Sampler:
    """Build the sampler. Collective if replicas have several ranks and there is an environment.

    Args:
        config: sections sampling, environment, reward and algorithm.
        engine: of this rank.
        workers: of `start_workers`.
        collectives: of this rank.
        timers: timer of the phase `reward`.
        model_folder: holds the tokenizer.
        answers: collects the times of this rank's rollouts; None: they are not measured.
    """
    timers.count_progress(lambda: engine.steps)
    generator: Generator = engine
    if config.environment is not None:
        generator = _multi_turn_generator(config, engine, workers, collectives.ranks, model_folder)
    ends_of = special_text_of = None
    if config.algorithm.advantage in ("process", "gae") and not config.reward.shuffle:  # shuffled rewards have no steps
        ends_of = partial(token_ends, load_tokenizer(model_folder))
    components = build_rewards(config.reward.terms)
    if any("completion_with_special_tokens" in component.inputs for component in components):
        special_text_of = partial(text_with_special_tokens, load_tokenizer(model_folder))
    floor_of = partial(_lowest_reward, components)
    per_wave = config.sampling.prompts_per_wave
    if answers is not None:
        generator = MeasuredGenerator(generator, answers, engine.take_gauges, workers.environments)
    names = [component.name for component in components]
    return Sampler(generator, workers.rewards, collectives, timers, per_wave, names, floor_of, ends_of, special_text_of)


def _multi_turn_generator(
    config: Config, engine: Engine, workers: Workers, ranks: Ranks, model_folder: Path
) -> MultiTurnGenerator:
    environment, topology = config.environment, ranks.topology
    assert environment is not None
    shard_group = replica_group = None
    if topology.share_size > 1:
        groups = [dist.new_group(topology.share_ranks(i)) for i in range(topology.num_shares)]
        shard_group = groups[ranks.at.share]
    if topology.engine_ranks > topology.share_size:
        groups = [dist.new_group(topology.replica_ranks(i)) for i in range(topology.num_replicas)]
        replica_group = groups[ranks.at.replica]
    stop = environment.stop if environment.stop is not None else build_environment(environment).stop
    return MultiTurnGenerator(
        engine,
        workers.environments,
        ResultText(load_tokenizer(model_folder), environment.before, environment.after),
        stop=stop,
        max_turns=environment.max_turns,
        share=broadcast_within(shard_group, topology.share_ranks(ranks.at.share)[0]),
        any_unfinished=any_rank_within(replica_group),
    )


def _lowest_reward(components: Sequence[RewardComponent], dataset: str) -> Reward:
    """Return the reward of a rollout whose environment failed: the lowest value of every term of its data set."""
    terms = [component for component in components if component.applies_to(dataset)]
    value = sum(term.weight * term.low for term in terms)  # the same as for a reward that fails
    return Reward(value, {term.name: term.low for term in terms}, ("environment",))
