"""Limit of the age of the groups that a step trains on.

The age of a group is the number of updates between the weights of its oldest token and those of the step. A group that
is older than the limit at the start of a step is dropped, and its prompt is sampled again before others, so that every
prompt is trained once. A second group that would be too old in the next step has a reserved place in this one
(step_quota.py). If there are more such groups than places, the rest is dropped too when it is too old.
Asserted by tests/unit/rollout/test_partial_sampler.py and tests/unit/rollout/test_rollout_buffer.py.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from grpo_mega.rollout.carried_rollouts import CarriedRollouts, OpenGroup

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StalenessLimit:
    """Limit of the age of groups.

    Attributes:
        max_staleness: largest allowed age, in updates.
        updates_per_step: updates of a step.
    """

    max_staleness: int
    updates_per_step: int

    def drop_old(self, carried: CarriedRollouts, policy_version: int) -> tuple[CarriedRollouts, int]:
        """Drop the groups that are too old for a step with these weights; return the rest, and the number of dropped.

        The prompt of each dropped group is sampled again, before others.
        """
        old = [group for group in carried.groups if _age(group, policy_version) > self.max_staleness]
        again = sum(group.is_second for group in old)
        if again:
            log.warning(
                "%d groups are older than max_staleness=%d for the second time, and their prompts are sampled again; "
                "a larger max_staleness drops fewer groups",
                again,
                self.max_staleness,
            )
        return carried.drop(set(old).__contains__, is_second=True), len(old)

    def must_end(self, group: OpenGroup, policy_version: int) -> bool:
        """Return True for a second group that would be too old for the step after the one with these weights."""
        return group.is_second and _age(group, policy_version) + self.updates_per_step > self.max_staleness


def _age(group: OpenGroup, policy_version: int) -> int:
    oldest = group.oldest_version
    return 0 if oldest is None else policy_version - oldest
