"""Stops a run whose engine does not compute what the policy computes, although every check of the weight sync passed.

The sync verifies bytes. It cannot see an engine that reads the right bytes with another function, or that reads
parameters that no check knows. Both change the log-probs of the sampled tokens, which every step compares anyway: each
step samples with the weights of the sync before it, and `old_log_probs` are the policy's with the same weights.

The comparison is |old_log_probs - sampler_log_probs| of every loss token whose probability is above MIN_PROBABILITY for
the policy or for the sampler; the log-probs of less likely tokens are dominated by rounding. Sampling has no other
setting than the temperature, at which the policy computes too, and corrections (`algorithm.correction`) do not change
the compared values. Legitimate differences are rounding, FP8 values, and experts that the engine's router and the
policy's choose differently; the bounds of AUTO are for these. Rounding has a tail, 2,000 times the median in
bf16 (docs/measurements/mismatch.md). Therefore a run stops if the bound is exceeded by more than 2 tokens and by more
than one in a thousand, or by a single token fourfold. Equal rollouts of one prompt count once. A wrong engine changes
the log-probs of many tokens.
Asserted by tests/unit/trainer/test_mismatch_guard.py and tests/e2e/test_mismatch_guard.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, islice

from grpo_mega.config.schema import Config
from grpo_mega.types import Completion, Rollout

MIN_PROBABILITY = 1e-3
AUTO = {"fp32": 1e-2, "bf16": 0.5}
"""Bound by `precision.dtype`, in nats."""
AUTO_COARSE = 2.0
"""Bound with FP8 in policy or engine, and with experts whose choices are not replayed, in nats."""


MOST_OUTLIERS, OUTLIER_FRACTION = 2, 1e-3
"""Tokens of a step that may exceed the bound: this number, or this fraction if it is more."""
FAR = 4.0
"""A single token that exceeds the bound by this factor stops the run."""


class EngineMismatchError(RuntimeError):
    """Policy and engine do not give the same tokens the same log-probs. Raised on every rank, before a checkpoint."""


@dataclass(frozen=True)
class TokenMismatch:
    """The largest difference of a step: token `token` of the loss tokens of rollout `rollout`.

    `size` is |old_log_prob - sampler_log_prob| in nats, infinite if one of them is not a number.
    """

    size: float
    rollout: int
    token: int
    old_log_prob: float
    sampler_log_prob: float


def with_known(
    rollouts: Sequence[Rollout], old_log_probs: Sequence[Sequence[float] | None]
) -> tuple[list[Rollout], list[Sequence[float]]]:
    """Return the rollouts whose log-probs before the update are known, and these log-probs."""
    known = [(rollout, olds) for rollout, olds in zip(rollouts, old_log_probs, strict=True) if olds is not None]
    return [rollout for rollout, _ in known], [olds for _, olds in known]


def largest_mismatch(rollouts: Sequence[Rollout], old_log_probs: Sequence[Sequence[float]]) -> TokenMismatch | None:
    """Return the largest of `likely_mismatches`; None if there are none."""
    return max(likely_mismatches(rollouts, old_log_probs), key=lambda each: each.size, default=None)


def likely_mismatches(rollouts: Sequence[Rollout], old_log_probs: Sequence[Sequence[float]]) -> Iterator[TokenMismatch]:
    """Yield the difference of each loss token with a probability above MIN_PROBABILITY.

    Args:
        rollouts: all rollouts of the step.
        old_log_probs: for each rollout, the log-probs of its loss tokens before the update.
    """
    least = math.log(MIN_PROBABILITY)
    for i, (rollout, olds) in enumerate(zip(rollouts, old_log_probs, strict=True)):
        for t, (old, sampled) in enumerate(zip(olds, rollout.completion.loss_log_probs, strict=True)):
            if old <= least and sampled <= least:
                continue
            size = abs(old - sampled)
            yield TokenMismatch(math.inf if math.isnan(size) else size, i, t, old, sampled)


@dataclass(frozen=True)
class MismatchGuard:
    """The bound of `guard.max_mismatch`, in nats, and the reason for it; `bound` None: nothing is checked."""

    bound: float | None
    reason: str

    @classmethod
    def of(cls, config: Config, *, has_experts: bool) -> MismatchGuard:
        """Return the guard of a run; `has_experts` is True for mixture-of-experts models."""
        value = config.guard.max_mismatch
        if value != "auto":
            return cls(value, f"guard.max_mismatch={value}")
        if config.engine.fp8 is not None or config.precision.fp8 is not None:
            return cls(AUTO_COARSE, "guard.max_mismatch=auto with FP8")
        if has_experts and not config.algorithm.routing_replay:
            return cls(AUTO_COARSE, "guard.max_mismatch=auto with experts and without algorithm.routing_replay")
        dtype = config.precision.dtype
        return cls(AUTO[dtype], f"guard.max_mismatch=auto with precision.dtype={dtype}")

    def check(
        self, step: int, rollouts: Sequence[Rollout], old_log_probs: Sequence[Sequence[float]], passed: str
    ) -> None:
        """Compare policy and engine on the rollouts of a step; every rank comes to the same result.

        Args:
            step: for the message.
            rollouts: all rollouts of the step, equal on every rank.
            old_log_probs: for each rollout, the log-probs of its loss tokens before the update.
            passed: the checks that the last weight sync passed, for the message.

        Raises:
            EngineMismatchError: on every rank; too many tokens exceed the bound, or one by far (see above).
        """
        if self.bound is None:
            return
        found = _without_repetitions(rollouts, likely_mismatches(rollouts, old_log_probs))
        beyond = [each for each in found if each.size > self.bound]
        if not beyond:
            return
        worst = max(beyond, key=lambda each: each.size)
        if len(beyond) <= max(MOST_OUTLIERS, OUTLIER_FRACTION * len(found)) and worst.size <= FAR * self.bound:
            return
        versions = ", ".join(map(str, sorted({r.completion.policy_version for r in rollouts})))
        prompt = rollouts[worst.rollout].prompt.index
        raise EngineMismatchError(
            f"step {step}: policy and engine differ by {worst.size:.3g} nats, more than {self.bound:g} "
            f"({self.reason}), and {len(beyond)} of {len(found)} tokens exceed the bound: "
            f"token {worst.token} of a rollout of prompt {prompt} has log-prob {worst.old_log_prob:.4f} in the policy "
            f"and {worst.sampler_log_prob:.4f} in the engine, which sampled with weights of version {versions}. "
            f"The run stops before its checkpoint. Checks of the last weight sync: {passed}. The engine therefore "
            "computes another function, or reads parameters that these checks do not cover: compare the policy with "
            "transformers (tools/compare_logits.py), remove engine.args, and try the other engine.kind. "
            "If the difference is expected, raise guard.max_mismatch"
        )


def _without_repetitions(rollouts: Sequence[Rollout], found: Iterable[TokenMismatch]) -> list[TokenMismatch]:
    """Return the largest mismatch of each token of a prompt with the same tokens before it.

    Equal rollouts round equally. `found` is ordered by rollout.
    """
    distinct: dict[tuple[int, int], TokenMismatch] = {}
    for i, group in groupby(found, key=lambda each: each.rollout):
        prefixes = _prefix_hashes(rollouts[i].completion)
        for each in group:
            key = rollouts[i].prompt.index, prefixes[each.token]
            if key not in distinct or distinct[key].size < each.size:
                distinct[key] = each
    return list(distinct.values())


def _prefix_hashes(completion: Completion) -> list[int]:
    """Return for each loss token a hash of the tokens of the completion up to it."""
    mask = completion.loss_mask or (True,) * len(completion.token_ids)
    hashes = accumulate(completion.token_ids, lambda before, token: hash((before, token)), initial=0)
    return [value for value, has_loss in zip(islice(hashes, 1, None), mask, strict=True) if has_loss]
