"""The comparison of policy and engine by new samples: when it is made, what is sampled, and what is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo_mega.config.schema import Config
from grpo_mega.data.row_plan import RolloutCost
from grpo_mega.interfaces import Policy
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.topology import Topology
from grpo_mega.rollout.carried_rollouts import CarriedRollouts
from grpo_mega.rollout.sampled_groups import SampledGroups, StepCarry
from grpo_mega.trainer.engine_probe import LEAST_TOKENS, MAX_TOKENS, NUM_PROMPTS, EngineProbe
from grpo_mega.trainer.mismatch_guard import EngineMismatchError, MismatchGuard
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.types import Completion, Microbatch, Prompt, Reward, Rollout, SamplingRequest
from tests.helpers.thread_ranks import on_ranks, one_rank

CONFIG = Config.model_validate(
    {
        "model": {"path": "m"},
        "data": {"train": "arithmetic:train"},
        "reward": {"terms": [{"name": "exact"}]},
        "train": {"steps": 1, "max_tokens_per_microbatch": 64},
        "sampling": {"max_tokens": 100, "temperature": 0.7},
    }
)
PRESENT = 8


class Engine:
    """Engine whose log-prob of token t is -t/8; records its requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, SamplingRequest]] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        self.requests.append((len(prompts), sampling))
        assert on_completion is not None
        for i, prompt in enumerate(prompts):
            tokens = tuple((prompt.index + k) % 8 for k in range(3))
            on_completion(i, 0, Completion(tokens, tuple(-t / 8 for t in tokens), "length", PRESENT, ""))
        return []


class TokenPolicy:
    """Policy whose log-prob of token t is -t/8 + `error`."""

    def __init__(self, error: float) -> None:
        self.error = error

    def log_probs(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        return [torch.where(m.loss_mask, -m.labels / 8 + self.error, 0.0) for m in microbatches]


def probe_of(engine: Engine, transfer: RolloutTransfer) -> EngineProbe:
    return EngineProbe.of(engine, CONFIG, transfer, RolloutCost(), PhaseTimer())


def step_of(versions: Sequence[int], num_groups: int = 1) -> SampledGroups:
    """Return a step whose rollouts have one token for each version."""
    rollouts = [
        Rollout(
            Prompt(i, "", (1, 2), ""),
            Completion(
                np.arange(len(versions)) % 8,
                np.zeros(len(versions)),
                "eos",
                PRESENT,
                "",
                policy_versions=np.array(versions, np.int32),
            ),
            Reward(0.0),
            0,
        )
        for i in range(num_groups)
    ]
    carried = cast("CarriedRollouts", None)
    return replace(SampledGroups.of(rollouts, 1), carry=StepCarry(carried, PRESENT, 0, 0, 0))


@pytest.mark.parametrize(
    ("num_present", "needed"), [(0, True), (LEAST_TOKENS - 1, True), (LEAST_TOKENS, False), (1000, False)]
)
def test_new_samples_are_needed_below_a_number_of_tokens_of_the_present_weights(num_present: int, needed: bool) -> None:
    probe = probe_of(Engine(), one_rank())
    assert probe.is_needed(step_of([PRESENT - 1] * 500 + [PRESENT] * num_present)) is needed


def test_a_step_without_carried_rollouts_needs_none() -> None:
    assert not probe_of(Engine(), one_rank()).is_needed(replace(step_of([PRESENT]), carry=None))


def test_the_first_prompts_get_one_short_answer_each_at_the_temperature_of_the_run() -> None:
    engine = Engine()
    sampled = probe_of(engine, one_rank()).sample(step_of([0], num_groups=NUM_PROMPTS + 9), step=3)
    (number, request), *others = engine.requests
    assert (number, others) == (NUM_PROMPTS, [])
    assert (request.group_size, request.temperature, request.max_tokens) == (1, 0.7, MAX_TOKENS)
    assert len(sampled.table) == NUM_PROMPTS


@pytest.mark.parametrize(("dp", "error"), [(1, 0.0), (1, 0.75), (2, 0.75), (4, -0.5)])
def test_every_token_of_the_answers_is_compared_with_the_policy(dp: int, error: float) -> None:
    def of_rank(transfer: RolloutTransfer) -> None:
        probe = probe_of(Engine(), transfer)
        compared = probe.compare(cast("Policy", TokenPolicy(error)), probe.sample(step_of([0], 10), step=1))
        gather: Any = transfer.collectives.gather
        sums = gather(compared.differences.sums())
        assert sums[:, 4].sum() == 30
        assert sums[:, 0].max() == pytest.approx(abs(error))
        guard = MismatchGuard(0.3, "", is_exact=True)
        if error:
            with pytest.raises(EngineMismatchError, match="version 8"):
                guard.check(1, compared, gather, "")
        else:
            guard.check(1, compared, gather, "")

    on_ranks(Topology(dp), of_rank)
