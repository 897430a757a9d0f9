"""Held-out accuracy with the engine, as the policy answers by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_mega.config.schema import Config
from grpo_mega.observe.summary import Evaluation
from grpo_mega.rollout import Sampler
from grpo_mega.types import Prompt, Reward, SamplingRequest


@dataclass(frozen=True)
class Evaluator:
    """`answer_term` is the reward term that says whether an answer is right, `full_marks` its value when it is."""

    sampler: Sampler
    prompts: Sequence[Prompt]
    config: Config
    answer_term: str
    full_marks: float

    def evaluate(self) -> Evaluation:
        """Collective. Accuracy is pass@1: the mean over k samples of each prompt; one greedy answer beside it.

        The same samples are drawn for the same weights: seeds do not depend on the step.
        """
        limits = self.config.evaluation
        max_tokens = limits.max_tokens or self.config.sampling.max_tokens
        request = SamplingRequest(limits.k, limits.temperature, max_tokens, seed=0)
        sampled = self.sampler.sample(self.prompts, request, ("evaluation", self.config.run.seed)).rollouts
        greedy_request = SamplingRequest(1, 0.0, max_tokens, seed=0)
        greedy = self.sampler.sample(self.prompts, greedy_request, ("evaluation", self.config.run.seed)).rollouts
        return Evaluation(
            accuracy=_mean([self.is_right(r.reward) for r in sampled]),
            reward_mean=_mean([r.reward.value for r in sampled]),
            length_mean=_mean([len(r.completion.token_ids) for r in sampled]),
            num_prompts=len(self.prompts),
            greedy_accuracy=_mean([self.is_right(r.reward) for r in greedy]),
        )

    def is_right(self, reward: Reward) -> bool:
        """The answer's term has full marks."""
        return reward.components[self.answer_term] >= self.full_marks


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
