"""Report of which rules of `guard.rules` held in a step, for metrics and quarantine. trainer/run_guard.py makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class HeldRule:
    """A rule that held in a step, and its action."""

    rule: str
    action: str
    reason: str


@dataclass(frozen=True)
class GuardReport:
    """Report of the rules in a step; equal on every rank.

    Attributes:
        metrics: metrics `guard/*` of the step.
        findings: rules that held.
        quarantined: [P] True for each group that goes to quarantine; None: no group does.
        prompts_step: step whose prompts were used; 0: that of the step itself.
        attempt: number of returns to a checkpoint before this step.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    findings: Sequence[HeldRule] = ()
    quarantined: NDArray[np.bool_] | None = None
    prompts_step: int = 0
    attempt: int = 0
