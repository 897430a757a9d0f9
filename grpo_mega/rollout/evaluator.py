"""Evaluates the policy on held-out prompts with the engine, without an environment's tools.

Asserted by tests/unit/rollout/test_evaluator.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from grpo_mega.config.rollout_sections import EvaluationConfig
from grpo_mega.data.dataset import DataSet
from grpo_mega.observe.summary import Evaluation
from grpo_mega.rollout.pass_at_k import final_answer, majority_at_k, pass_at_k
from grpo_mega.rollout.sampler import Sampler
from grpo_mega.types import Reward, Rollout, SamplingRequest


@dataclass(frozen=True)
class Evaluator:
    """Evaluator of the held-out sets.

    `answer_term` is the reward term that measures correctness; an answer is correct if its value is `full_marks`.
    """

    sampler: Sampler
    sets: Sequence[DataSet]
    config: EvaluationConfig
    max_tokens: int
    seed: int
    answer_term: str
    full_marks: float

    def evaluate(self) -> Evaluation:
        """Sample and score all held-out prompts. Collective.

        Accuracy is pass@1, the mean over k samples of each prompt. A greedy answer per prompt is scored separately. All
        sets are sampled together. Seeds do not depend on the step, so equal weights give equal samples.
        """
        parts = [(part.name, part.prompts[: self.config.max_prompts]) for part in self.sets]
        prompts = [prompt for _, chosen in parts for prompt in chosen]
        k, seed_of = self.config.k, ("evaluation", self.seed)
        request = SamplingRequest(k, self.config.temperature, self.max_tokens, seed=0)
        sampled = self.sampler.sample(prompts, request, seed_of).rollouts
        greedy = self.sampler.sample(prompts, replace(request, group_size=1, temperature=0.0), seed_of).rollouts
        whole = self._evaluation(sampled, greedy)
        if len(parts) == 1:
            return whole
        sets, begin = {}, 0
        for name, chosen in parts:
            end = begin + len(chosen)
            sets[name] = self._evaluation(sampled[begin * k : end * k], greedy[begin:end])
            begin = end
        return replace(whole, sets=sets)

    def is_right(self, reward: Reward) -> bool:
        """Return True if the reward means a correct answer."""
        return reward.components[self.answer_term] >= self.full_marks

    def _evaluation(self, sampled: Sequence[Rollout], greedy: Sequence[Rollout]) -> Evaluation:
        """Evaluate prompts with k samples each, in order."""
        n = self.config.k
        groups = [sampled[begin : begin + n] for begin in range(0, len(sampled), n)]
        right = [[self.is_right(r.reward) for r in group] for group in groups]
        answers = [[final_answer(r.completion.text) for r in group] for group in groups]
        ks = self.config.report_k or (n,)
        votes = list(zip(answers, right, strict=True))
        return Evaluation(
            accuracy=_mean([is_right for group in right for is_right in group]),
            reward_mean=_mean([r.reward.value for r in sampled]),
            length_mean=_mean([len(r.completion.token_ids) for r in sampled]),
            num_prompts=len(groups),
            greedy_accuracy=_mean([self.is_right(r.reward) for r in greedy]),
            pass_at_k={str(k): _mean([pass_at_k(n, sum(group), k) for group in right]) for k in ks},
            majority_at_k={str(k): _mean([majority_at_k(a, is_right, k) for a, is_right in votes]) for k in ks},
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
