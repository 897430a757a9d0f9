"""Stops a run whose engine does not compute what the policy computes, although every check of the weight sync passed.

The sync verifies bytes, before and after sampling. It cannot find an engine that computes another function with the
right bytes, or that reads parameters which no check covers. Both change the log-probs of the sampled tokens. The guard
compares them with `old_log_probs`, which the policy computes with the same weights. A step with too few tokens of these
weights is compared on new samples (engine_probe.py).

The comparison is |old_log_probs - sampler_log_probs| of every loss token whose probability is above MIN_PROBABILITY
(mismatch.py) for the policy or for the sampler; the log-probs of less likely tokens are dominated by rounding. Sampling
has no other setting than the temperature, at which the policy computes too, and corrections (`algorithm.correction`) do
not change the compared values. Legitimate differences are rounding, FP8 values, and experts that the engine's router
and the policy's choose differently; the bounds of AUTO are for these. In fp32 one token beyond the bound stops the run.
Rounding of bf16 has a tail, 2,000 times the median (docs/measurements/mismatch.md): in a long healthy run a token
exceeds the bound now and then. A wrong engine stays wrong. Therefore a run in bf16, in FP8, or with experts whose
choices are not replayed stops in one of three cases:

- in a step, more than 2 tokens and more than one in a thousand exceed the bound;
- in a step, a single token exceeds the bound fourfold;
- in 3 of the last 5 steps, at least one token and more than one in ten thousand exceed the bound.

Equal rollouts of one prompt count once. The last steps are not part of a checkpoint: a job that is started again begins
to count from zero.
Asserted by tests/unit/trainer/test_mismatch_guard.py and tests/e2e/test_mismatch_guard.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from grpo_mega.config.schema import Config
from grpo_mega.trainer.mismatch import ComparedTokens
from grpo_mega.trainer.run_guard import GuardStopError

AUTO = {"fp32": 1e-2, "bf16": 0.5}
"""Bound by `precision.dtype`, in nats."""
AUTO_COARSE = 2.0
"""Bound with FP8 in policy or engine, and with experts whose choices are not replayed, in nats."""


MOST_OUTLIERS, OUTLIER_FRACTION = 2, 1e-3
"""Tokens of a step that may exceed the bound: this number, or this fraction if it is more."""
FAR = 4.0
"""A single token that exceeds the bound by this factor stops the run."""
REPEATED_FRACTION = 1e-4
"""A step counts for the third case if more than this fraction of its tokens exceed the bound."""
WINDOW, MOST_REPEATED = 5, 2
"""Of the last `WINDOW` steps, at most `MOST_REPEATED` may count."""


class EngineMismatchError(GuardStopError):
    """Policy and engine do not give the same tokens the same log-probs. Raised on every rank, before a checkpoint."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "guard.max_mismatch=null")


@dataclass
class MismatchGuard:
    """Guard of a run against an engine that differs from the policy.

    `bound` is in nats; None: nothing is checked. `reason` names the setting that gives the bound, for the message.
    """

    bound: float | None
    reason: str
    is_exact: bool = False
    """True if nothing but fp32 rounding may differ: then no token may exceed the bound."""
    _last_steps: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW), init=False, repr=False)

    @classmethod
    def of(cls, config: Config, *, has_experts: bool) -> MismatchGuard:
        """Build the guard of a run; `has_experts` is True for mixture-of-experts models."""
        value, dtype = config.guard.max_mismatch, config.precision.dtype
        has_fp8 = config.engine.fp8 is not None or config.precision.fp8 is not None
        may_route_otherwise = has_experts and not config.algorithm.routing_replay
        is_exact = dtype == "fp32" and not has_fp8 and not may_route_otherwise
        if value != "auto":
            return cls(value, f"guard.max_mismatch={value}", is_exact)
        if has_fp8:
            return cls(AUTO_COARSE, "guard.max_mismatch=auto with FP8")
        if may_route_otherwise:
            return cls(AUTO_COARSE, "guard.max_mismatch=auto with experts and without algorithm.routing_replay")
        return cls(AUTO[dtype], f"guard.max_mismatch=auto with precision.dtype={dtype}", is_exact)

    def check(
        self,
        step: int,
        compared: ComparedTokens,
        gather: Callable[[NDArray[np.float64]], NDArray[np.float64]],
        passed: str,
    ) -> None:
        """Compare policy and engine on the rollouts of a step. Collective: every rank comes to the same result.

        Args:
            step: for the message.
            compared: tokens of which policy and engine are compared.
            gather: returns the arrays of all ranks, [ranks, ...].
            passed: the checks that the last weight sync passed, for the message.

        Raises:
            EngineMismatchError: on every rank, in one of the cases above.
        """
        if self.bound is None:
            return
        differences, table = compared.differences, compared.table
        if not gather(np.array([float(differences.num_beyond(self.bound))])).any():
            self._last_steps.append(False)
            return
        sizes = differences.sizes
        beyond = (sizes > self.bound) & differences.is_likely
        distinct = differences.distinct(table.prompt_index[differences.tokens.ids])
        largest = distinct[np.argmax(sizes[distinct])] if len(distinct) else None
        described = [-1.0, 0.0, 0.0, 0.0, 0.0]
        if largest is not None:
            rollout, token = differences.place(int(largest))
            prompt = table.prompt_index[differences.tokens.ids[rollout]]
            described = [sizes[largest], prompt, token, differences.old[largest], differences.sampled[largest]]
        parts = gather(np.array([float(beyond[distinct].sum()), float(len(distinct)), *described]))
        num_beyond, num_compared = (int(n) for n in parts[:, :2].sum(axis=0))
        size, prompt, token, old, sampled = parts[np.argmax(parts[:, 2]), 2:].tolist()
        self._last_steps.append(num_beyond > REPEATED_FRACTION * num_compared)
        num_repeated = sum(self._last_steps)
        is_wrong = (
            self.is_exact or num_beyond > max(MOST_OUTLIERS, OUTLIER_FRACTION * num_compared) or size > FAR * self.bound
        )
        if not is_wrong and num_repeated <= MOST_REPEATED:
            return
        repeated = f" This is so in {num_repeated} of the last {len(self._last_steps)} steps."
        versions = ", ".join(map(str, np.unique(table.policy_version).tolist()))
        raise EngineMismatchError(
            f"step {step}: policy and engine differ by {size:.3g} nats, more than {self.bound:g} "
            f"({self.reason}), and {num_beyond} of {num_compared} tokens exceed the bound: "
            f"token {token:.0f} of a rollout of prompt {prompt:.0f} has log-prob {old:.4f} in the policy "
            f"and {sampled:.4f} in the engine, which sampled with weights of version {versions}."
            f"{'' if is_wrong else repeated} The run stops before its checkpoint. "
            f"Checks of the last weight sync: {passed}. The engine therefore "
            "computes another function, or reads parameters that these checks do not cover: compare the policy with "
            "transformers (tools/compare_logits.py), remove engine.args, and try the other engine.kind. "
            "If the difference is expected, raise guard.max_mismatch"
        )
