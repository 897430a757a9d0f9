"""Differences of log-probs between policy and sampler for the same weights, on the rank that sampled the rollouts.

All rollouts of a prompt are on one rank, so equal rollouts are found without communication.
Asserted by tests/unit/trainer/test_mismatch.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_mega.algorithm.kl import MAX_REPORTED_LOG_RATIO
from grpo_mega.data.rollout_table import RolloutTable
from grpo_mega.data.rollout_tokens import RolloutTokens
from grpo_mega.types import TokenValues

MIN_PROBABILITY = 1e-3
"""Tokens that policy and sampler both find less likely are dominated by rounding, and are not compared."""
_Floats = NDArray[np.floating[Any]]
_BLOCK = 1 << 15
"""Tokens that are compared at once: the arrays of float64 stay in the cache, and none is as long as the log-probs."""


@dataclass(frozen=True)
class Differences:
    """Log-probs of the n loss tokens whose log-probs before the update are known, in nats.

    Attributes:
        tokens: the rollouts of these tokens.
        old: [n] of the policy before the update, in the type of `Differences.of`.
        sampled: [n] float32, of the sampler.
        counts: loss tokens of each rollout of `tokens`.
    """

    tokens: RolloutTokens
    old: _Floats
    sampled: NDArray[np.float32]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, tokens: RolloutTokens, old_log_probs: TokenValues, policy_version: int | None = None) -> Differences:
        """Compare the rollouts of `old_log_probs`.

        Args:
            tokens: rollouts that this rank sampled.
            old_log_probs: of some of these rollouts.
            policy_version: of the weights of `old_log_probs`. Tokens that other weights sampled are left out: their
                difference is a change of the policy. None: the same weights sampled all tokens.

        Raises:
            ValueError: a rollout has another number of old log-probs than of loss tokens.
        """
        is_known = np.isin(tokens.ids, old_log_probs.ids)
        known = tokens if is_known.all() else tokens.select(is_known)
        sampled = known.on_loss_tokens(known.sampler_log_probs)
        if not np.array_equal(sampled.ids, old_log_probs.ids) or not np.array_equal(
            sampled.offsets, old_log_probs.offsets
        ):
            raise ValueError(
                f"{len(old_log_probs.values)} old log-probs of {len(old_log_probs.ids)} rollouts; the sampler gave "
                f"{len(sampled.values)} loss tokens of {len(sampled.ids)} of them"
            )
        old = old_log_probs.values
        if policy_version is not None:
            is_present = (known.policy_versions == policy_version)[known.loss_mask]
            if not is_present.all():
                old = old[is_present]
                known = replace(known, loss_mask=known.loss_mask & (known.policy_versions == policy_version))
                sampled = known.on_loss_tokens(known.sampler_log_probs)
        return cls(known, old, sampled.values, sampled.counts)

    @property
    def sizes(self) -> NDArray[np.float64]:
        """|old - sampled| of each token, infinite if one of them is not a number, [n]."""
        return _sizes(self.old, self.sampled)

    @property
    def is_likely(self) -> NDArray[np.bool_]:
        """True for tokens with a probability above MIN_PROBABILITY for the policy or for the sampler, [n]."""
        return _is_likely(self.old, self.sampled)

    def num_beyond(self, bound: float) -> int:
        """Return the number of likely tokens whose difference exceeds the bound, in nats."""
        return sum(int(np.count_nonzero((_sizes(*part) > bound) & _is_likely(*part))) for part in self._blocks())

    def sums(self) -> NDArray[np.float64]:
        """Return max |m|, the same over likely tokens, sum and max of exp(m) - m - 1, n; [K] with K = 5.

        m is old - sampled. In exp, an m above 40 counts as 40, which does not overflow. A maximum over nothing is 0.
        """
        parts = np.array([_sums(*part) for part in self._blocks()] or [np.zeros(4)])
        largest = parts[:, :2].max(axis=0)
        return np.array([*largest, parts[:, 2].sum(), parts[:, 3].max(), len(self.old)])

    def _blocks(self) -> Iterator[tuple[_Floats, _Floats]]:
        """Yield `old` and `sampled` in parts of at most `_BLOCK` tokens."""
        for begin in range(0, len(self.old), _BLOCK):
            yield self.old[begin : begin + _BLOCK], self.sampled[begin : begin + _BLOCK]

    def distinct(self, prompt_index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return places 0..n-1 of the likely tokens, one for tokens of a prompt with the same tokens before them.

        The place is that of the largest difference. Equal rollouts round equally, so they count once.

        Args:
            prompt_index: [N] prompt of each rollout of `tokens`.
        """
        likely = np.flatnonzero(self.is_likely)
        prompts = _mixed(np.repeat(prompt_index, self.tokens.lengths)[self.tokens.loss_mask])
        keys = _mixed(_prefix_hashes(self.tokens)[self.tokens.loss_mask] + prompts)[likely]
        order = np.lexsort((-self.sizes[likely], keys))
        is_first = np.ones(len(order), np.bool_)
        is_first[1:] = keys[order][1:] != keys[order][:-1]
        return np.sort(likely[order[is_first]])

    def place(self, token: int) -> tuple[int, int]:
        """Return (place of the rollout in `tokens`, place of the token among its loss tokens)."""
        ends = np.cumsum(self.counts)
        rollout = int(np.searchsorted(ends, token, side="right"))
        return rollout, int(token - (ends[rollout] - self.counts[rollout]))


@dataclass(frozen=True)
class ComparedTokens:
    """Tokens of which policy and engine are compared in a step.

    `differences` are those of the rollouts that this rank sampled, and `table` has all rollouts, equal on every rank.
    """

    differences: Differences
    table: RolloutTable


def mismatch_metrics(sums: NDArray[np.float64]) -> dict[str, float]:
    """Return the mismatch metrics of a step from the `Differences.sums` of all ranks, [ranks, 5].

    `mismatch_max` = max |m|; `mismatch_likely_max` = the same over the tokens that `guard.max_mismatch` bounds, 0 if
    there are none; `mismatch_kl` = mean over tokens of exp(m) - m - 1, the k3 estimate of KL(sampler || policy), in
    nats per token, and `mismatch_kl_max` = its largest term; `mismatch_tokens` = n, the tokens that were compared.
    """
    return {
        "train/mismatch_tokens": float(sums[:, 4].sum()),
        "train/mismatch_max": float(sums[:, 0].max()),
        "train/mismatch_likely_max": float(sums[:, 1].max()),
        "train/mismatch_kl_max": float(sums[:, 3].max()),
        "train/mismatch_kl": float(sums[:, 2].sum() / max(1.0, sums[:, 4].sum())),
    }


def _differences(old: _Floats, sampled: _Floats) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.subtract(old, sampled, dtype=np.float64)


def _sizes(old: _Floats, sampled: _Floats) -> NDArray[np.float64]:
    found = np.abs(_differences(old, sampled))
    return np.where(np.isnan(found), np.inf, found)


def _is_likely(old: _Floats, sampled: _Floats) -> NDArray[np.bool_]:
    least = np.float64(math.log(MIN_PROBABILITY))
    return ~((old <= least) & (sampled <= least))


def _sums(old: _Floats, sampled: _Floats) -> NDArray[np.float64]:
    """Return the first four of `Differences.sums` for at least one token."""
    m = _differences(old, sampled)
    bounded = np.minimum(m, MAX_REPORTED_LOG_RATIO)
    k3 = np.expm1(bounded) - bounded
    likely = _sizes(old, sampled)[_is_likely(old, sampled)]
    return np.array([np.abs(m).max(), likely.max(initial=0.0), k3.sum(), k3.max()])


def _prefix_hashes(tokens: RolloutTokens) -> NDArray[np.uint64]:
    """Return for each token a hash of the completion's tokens up to it and of their positions, [T]."""
    starts = tokens.offsets[:-1] + tokens.prompt_tokens
    positions = np.arange(len(tokens.token_ids)) - np.repeat(starts, tokens.lengths)
    pairs = (positions.astype(np.uint64) << np.uint64(32)) ^ tokens.token_ids.astype(np.uint64)
    terms = np.where(positions >= 0, _mixed(pairs), np.uint64(0))
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])  # modulo 2^64
    return np.asarray(running[1:] - np.repeat(running[tokens.offsets[:-1]], tokens.lengths))


def _mixed(values: NDArray[np.int64] | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's mix of each number, an invertible function whose bits all depend on all bits."""
    x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
