"""Evaluates the policy on held-out prompts with the engine, without an environment's tools.

Asserted by tests/unit/rollout/test_evaluator.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from grpo_mega.config.rollout_sections import EvaluationConfig
from grpo_mega.data.dataset import DataSet
from grpo_mega.observe.summary import Evaluation
from grpo_mega.rewards.combine import has_full_marks
from grpo_mega.rollout.pass_at_k import final_answer, majority_at_k, pass_at_k
from grpo_mega.rollout.sampler import Sampler
from grpo_mega.types import Reward, Rollout, SamplingOptions, SamplingRequest


@dataclass(frozen=True)
class Evaluator:
    """Evaluator of the held-out sets.

    `full_marks` is the highest value of each reward term. An answer is correct if the first term that applies to it has
    its highest value.
    """

    sampler: Sampler
    sets: Sequence[DataSet]
    config: EvaluationConfig
    max_tokens: int
    seed: int
    full_marks: Mapping[str, float]

    def evaluate(self) -> Evaluation:
        """Sample and score all held-out prompts. Collective.

        Accuracy is pass@1, the mean over k samples of each prompt. A greedy answer per prompt is scored separately. All
        sets are sampled together. Seeds do not depend on the step, so equal weights give equal samples.
        """
        parts = [(part.name, part.prompts[: self.config.max_prompts]) for part in self.sets]
        prompts = [prompt for _, chosen in parts for prompt in chosen]
        k, seed_of = self.config.k, ("evaluation", self.seed)
        options = sampling_options(self.config)
        request = SamplingRequest(k, self.config.temperature, self.max_tokens, seed=0, options=options)
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
        return has_full_marks(reward, self.full_marks)

    def _evaluation(self, sampled: Sequence[Rollout], greedy: Sequence[Rollout]) -> Evaluation:
        """Evaluate prompts with k samples each, in order. Samples without a reward are left out of all but the length.

        pass@k and maj@k are means over the prompts with at least k samples that have a reward. A mean over nothing is
        0, and `failed_fraction` is 1 then.
        """
        n = self.config.k
        samples = [sampled[begin : begin + n] for begin in range(0, len(sampled), n)]
        groups = [[r for r in group if r.reward.value is not None] for group in samples]
        right = [[self.is_right(r.reward) for r in group] for group in groups]
        answers = [[final_answer(r.completion.text) for r in group] for group in groups]
        ks = self.config.report_k or (n,)
        return Evaluation(
            accuracy=_mean([is_right for group in right for is_right in group]),
            reward_mean=_mean([r.reward.value for r in sampled if r.reward.value is not None]),
            length_mean=_mean([len(r.completion.token_ids) for r in sampled]),
            num_prompts=len(groups),
            greedy_accuracy=_mean([self.is_right(r.reward) for r in greedy if r.reward.value is not None]),
            failed_fraction=_mean([bool(r.reward.failures) for r in sampled]),
            pass_at_k={
                str(k): _mean([pass_at_k(len(group), sum(group), k) for group in right if len(group) >= k]) for k in ks
            },
            majority_at_k={
                str(k): _mean(
                    [majority_at_k(a, group, k) for a, group in zip(answers, right, strict=True) if len(group) >= k]
                )
                for k in ks
            },
        )


def sampling_options(config: EvaluationConfig) -> SamplingOptions:
    """Return the options of the engine that the section `evaluation` sets."""
    values = {field.name: getattr(config, field.name) for field in fields(SamplingOptions)}
    return SamplingOptions(**values | {"logit_bias": tuple(sorted(config.logit_bias.items()))})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
