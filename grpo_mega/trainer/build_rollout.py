"""Builds the sampling side of a job: reward and environment workers, the sampler, and its process groups."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from grpo_mega.checkpoint.carried_parts import CarriedParts
from grpo_mega.config.schema import Config
from grpo_mega.data.answer_text import answer_text
from grpo_mega.data.chat import ResultText, load_tokenizer, text_with_special_tokens, token_ends
from grpo_mega.data.dataset import PromptDataset
from grpo_mega.environments.base import build_environment
from grpo_mega.environments.pool import EnvironmentPool
from grpo_mega.interfaces import Engine
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.array_collectives import ArrayCollectives
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.rewards.base import RewardComponent, build_rewards
from grpo_mega.rewards.pool import RewardPool
from grpo_mega.rollout.answer_times import AnswerTimes, MeasuredGenerator, SamplingMeasurement
from grpo_mega.rollout.carried_rollouts import CarriedRollouts, PromptShard, redistribute
from grpo_mega.rollout.dynamic_sampling import GroupSource, PartialSampling
from grpo_mega.rollout.multi_turn import MultiTurnGenerator, any_rank_within, broadcast_within
from grpo_mega.rollout.partial_sampler import PartialSampler, numbered_prompts
from grpo_mega.rollout.sampler import Generator, Sampler
from grpo_mega.rollout.slices import SliceSampler
from grpo_mega.trainer.build_async import make_async_sampler
from grpo_mega.trainer.engine_rebuilds import RebuildableEngine
from grpo_mega.types import Reward

log = logging.getLogger(__name__)


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
    dialogue: MultiTurnGenerator | None,
    answers: AnswerTimes | None = None,
) -> Sampler:
    """Build the sampler.

    Args:
        config: sections sampling, environment, reward and algorithm.
        engine: of this rank.
        workers: of `start_workers`.
        collectives: of this rank.
        timers: timer of the phase `reward`.
        model_folder: holds the tokenizer.
        dialogue: of `make_dialogue`.
        answers: collects the times of this rank's rollouts; None: they are not measured.
    """
    timers.count_progress(lambda: engine.steps)
    generator: Generator = engine if dialogue is None else dialogue
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


def make_source(
    config: Config,
    engine: RebuildableEngine,
    workers: Workers,
    collectives: ArrayCollectives,
    timers: PhaseTimer,
    model_folder: Path,
    answers: AnswerTimes,
    prompts: PromptDataset,
) -> tuple[Sampler, GroupSource]:
    """Build the sampler of this rank, and the source of the groups of each step. Collective.

    Args:
        config: sections sampling, environment, reward, algorithm, engine and data.
        engine: of this rank.
        workers: of `start_workers`.
        collectives: of this rank.
        timers: timer of the phase `reward`.
        model_folder: holds the tokenizer.
        answers: collects the times of this rank's rollouts.
        prompts: training prompts.
    """
    dialogue = make_dialogue(config, engine, workers, collectives.ranks, model_folder)
    sampler = make_sampler(config, engine, workers, collectives, timers, model_folder, dialogue, answers)
    partial_sampler: PartialSampling | None = None
    if config.is_asynchronous:
        partial_sampler = make_async_sampler(
            config, engine, workers.environments, sampler, dialogue, prompts, timers, model_folder, answers
        )
    elif config.sampling.partial is not None:
        measurement = SamplingMeasurement(answers, engine.take_gauges, workers.environments)
        partial_sampler = _partial_sampler(
            config, engine, sampler, dialogue, prompts, timers, model_folder, measurement
        )
    return sampler, GroupSource(sampler, prompts, config, partial_sampler)


def _partial_sampler(
    config: Config,
    engine: Engine,
    sampler: Sampler,
    dialogue: MultiTurnGenerator | None,
    prompts: PromptDataset,
    timers: PhaseTimer,
    model_folder: Path,
    measurement: SamplingMeasurement,
) -> PartialSampler:
    """Build the sampler of partial rollouts, which scores as `sampler` does. Collective if the replica has copies."""
    text_of = partial(answer_text, load_tokenizer(model_folder))
    return PartialSampler(
        SliceSampler(engine, config.sampling.slice_tokens, config.engine.max_num_seqs, text_of, dialogue),
        sampler.scoring,
        sampler.collectives,
        timers,
        config,
        numbered_prompts(prompts, config.data.prompts_per_step, config.run.seed),
        lambda: engine.policy_version,
        measurement,
        sampler.component_names,
        _any_rank_of_replica(sampler.collectives.ranks) if dialogue is None else dialogue.any_unfinished,
    )


def carried_parts(config: Config, prompts: PromptDataset, ranks: Ranks) -> CarriedParts | None:
    """Return the files of carried rollouts in a checkpoint; None if no rollouts are carried from step to step.

    Args:
        config: sections sampling, data and run.
        prompts: training prompts.
        ranks: coordinates of this rank.
    """
    if not config.carries_rollouts:
        return None
    per_step = config.data.prompts_per_step
    shard = PromptShard(ranks.at.prompt_shard, ranks.topology.num_prompt_shards, per_step)
    prompt_of = numbered_prompts(prompts, per_step, config.run.seed)

    def read(paths: Sequence[Path]) -> CarriedRollouts:
        if len(paths) == shard.num_shards:
            return CarriedRollouts.from_bytes(paths[shard.index].read_bytes(), prompt_of)
        log.warning("carried rollouts of %d prompt shards are dealt out to %d", len(paths), shard.num_shards)
        return redistribute([CarriedRollouts.from_bytes(path.read_bytes(), prompt_of) for path in paths], shard)

    return CarriedParts(ranks.rank, ranks.at.engine_tp_rank == 0, read)


def make_dialogue(
    config: Config, engine: Engine, workers: Workers, ranks: Ranks, model_folder: Path
) -> MultiTurnGenerator | None:
    """Build the generator of rollouts with several turns; None without an environment.

    Collective if replicas have several ranks and there is an environment.

    Args:
        config: section environment.
        engine: of this rank.
        workers: of `start_workers`.
        ranks: coordinates of this rank.
        model_folder: holds the tokenizer.
    """
    environment, topology = config.environment, ranks.topology
    if environment is None:
        return None
    shard_group = None
    if topology.prompt_shard_size > 1:
        groups = [dist.new_group(topology.prompt_shard_ranks(i)) for i in range(topology.num_prompt_shards)]
        shard_group = groups[ranks.at.prompt_shard]
    stop = environment.stop if environment.stop is not None else build_environment(environment).stop
    return MultiTurnGenerator(
        engine,
        workers.environments,
        ResultText(load_tokenizer(model_folder), environment.before, environment.after),
        stop=stop,
        max_turns=environment.max_turns,
        broadcast=broadcast_within(shard_group, topology.prompt_shard_ranks(ranks.at.prompt_shard)[0]),
        any_unfinished=_any_rank_of_replica(ranks),
    )


def _any_rank_of_replica(ranks: Ranks) -> Callable[[bool], bool]:
    """Return a function that is True if its argument is True on any rank of the replica. Collective."""
    topology = ranks.topology
    if topology.engine_ranks == topology.prompt_shard_size:
        return any_rank_within(None)
    groups = [dist.new_group(topology.replica_ranks(i)) for i in range(topology.num_replicas)]
    return any_rank_within(groups[ranks.at.replica])


def _lowest_reward(components: Sequence[RewardComponent], dataset: str) -> Reward:
    """Return the reward of a rollout whose environment failed: the lowest value of every term of its data set."""
    terms = [component for component in components if component.applies_to(dataset)]
    value = sum(term.weight * term.low for term in terms)  # the same as for a reward that fails
    return Reward(value, {term.name: term.low for term in terms}, ("environment",))
