"""Evaluates the policy on held-out prompts with the engine, without an environment's tools.

Asserted by tests/unit/rollout/test_evaluator.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from grpo_mega.config.rollout_sections import EvaluationConfig
from grpo_mega.data.dataset import DataSet
from grpo_mega.data.rollout_table import RolloutTable, SumOverRanks
from grpo_mega.observe.summary import Evaluation
from grpo_mega.rollout.pass_at_k import final_answer, majority_at_k, pass_at_k
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.rollout.sampler import Sampler
from grpo_mega.types import SamplingOptions, SamplingRequest


@dataclass(frozen=True)
class Evaluator:
    """Evaluator of the held-out sets.

    `full_marks` is the highest value of each reward term. An answer is correct if the first term that applies to it has
    its highest value. `sum_over_ranks` adds arrays over all ranks.
    """

    sampler: Sampler
    sets: Sequence[DataSet]
    config: EvaluationConfig
    max_tokens: int
    seed: int
    full_marks: Mapping[str, float]
    sum_over_ranks: SumOverRanks

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
        sampled = self.sampler.sample(prompts, request, seed_of)
        greedy = self.sampler.sample(prompts, replace(request, group_size=1, temperature=0.0), seed_of).table
        majorities = self._majorities(sampled)
        bounds = np.cumsum([0, *(len(chosen) for _, chosen in parts)]).tolist()

        def evaluation(begin: int, end: int) -> Evaluation:
            own = np.arange(begin, end)
            return self._evaluation(sampled.table.take_groups(own), greedy.take_groups(own), majorities[begin:end])

        whole = evaluation(0, len(prompts))
        if len(parts) == 1:
            return whole
        sets = {name: evaluation(bounds[i], bounds[i + 1]) for i, (name, _) in enumerate(parts)}
        return replace(whole, sets=sets)

    def is_right(self, table: RolloutTable) -> NDArray[np.bool_]:
        """Return True for each rollout whose reward means a correct answer, [R]."""
        return table.has_full_marks(self.full_marks)

    @property
    def _ks(self) -> tuple[int, ...]:
        return tuple(self.config.report_k or (self.config.k,))

    def _majorities(self, sampled: SampledGroups) -> NDArray[np.float64]:
        """Return maj@k of each prompt for each k, [P, number of ks]; NaN with fewer than k rewards. Collective.

        All answers to a prompt are on the rank that sampled them.
        """
        table, size = sampled.table, sampled.group_size
        right, scored = self.is_right(table), table.is_scored
        answers: dict[int, list[tuple[Hashable | None, bool]]] = {}
        for row, text in zip(sampled.tokens.ids.tolist(), sampled.texts, strict=True):
            group = answers.setdefault(row // size, [])
            if scored[row]:
                group.append((final_answer(text), bool(right[row])))
        found = np.zeros((table.num_groups, len(self._ks)))
        for prompt, group in answers.items():
            chosen, is_right = [answer for answer, _ in group], [of_answer for _, of_answer in group]
            found[prompt] = [majority_at_k(chosen, is_right, k) if len(group) >= k else np.nan for k in self._ks]
        return self.sum_over_ranks(found)

    def _evaluation(self, sampled: RolloutTable, greedy: RolloutTable, majorities: NDArray[np.float64]) -> Evaluation:
        """Evaluate prompts with k samples each, in order. Samples without a reward are left out of all but the length.

        pass@k and maj@k are means over the prompts with at least k samples that have a reward. A mean over nothing is
        0, and `failed_fraction` is 1 then.
        """
        right, scored = self.is_right(sampled), sampled.is_scored
        counts = scored.reshape(-1, self.config.k).sum(axis=1).tolist()
        num_right = right.reshape(-1, self.config.k).sum(axis=1).tolist()
        pairs = list(zip(counts, num_right, strict=True))
        return Evaluation(
            accuracy=_mean(right[scored].tolist()),
            reward_mean=_mean(sampled.reward[scored].tolist()),
            length_mean=_mean(sampled.completion_tokens.tolist()),
            num_prompts=len(counts),
            greedy_accuracy=_mean(self.is_right(greedy)[greedy.is_scored].tolist()),
            failed_fraction=_mean(sampled.has_failed.tolist()),
            pass_at_k={str(k): _mean([pass_at_k(n, right, k) for n, right in pairs if n >= k]) for k in self._ks},
            majority_at_k={
                str(k): _mean([value for value in majorities[:, i].tolist() if not np.isnan(value)])
                for i, k in enumerate(self._ks)
            },
        )


def sampling_options(config: EvaluationConfig) -> SamplingOptions:
    """Return the options of the engine that the section `evaluation` sets."""
    values = {field.name: getattr(config, field.name) for field in fields(SamplingOptions)}
    return SamplingOptions(**values | {"logit_bias": tuple(sorted(config.logit_bias.items()))})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
