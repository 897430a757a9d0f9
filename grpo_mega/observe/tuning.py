"""Advises which keys to change to make a run faster, from medians of metrics over its last 20 steps.

A run that has raised an alarm, or has fewer than 20 steps, gets no advice.
Asserted by tests/unit/observe/test_tuning.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo_mega.observe.history import History

if TYPE_CHECKING:
    from grpo_mega.observe.alarms import Alarm

_STEPS = 20


@dataclass(frozen=True)
class TuningRule:
    """A metric, the limit above which its median leads to advice, and the advice.

    Attributes:
        metric: name of the metric.
        limit: largest median without advice.
        text: the advice, with a placeholder `value` for the median.
        unless: name of a metric that exists only if the advice is followed already; None: there is no such metric.
    """

    metric: str
    limit: float
    text: str
    unless: str | None = None


RULES = (
    TuningRule(
        "rollout/last_answers_fraction",
        0.3,
        "in {value:.0%} of the sampling time only the last tenth of the answers is left; sampling.partial continues "
        "them in the next step",
        unless="rollout/carried_fraction",
    ),
    TuningRule(
        "engine/preemptions",
        0.0,
        "{value:.0f} times per step a request loses its KV cache; raise engine.memory_share or lower "
        "engine.max_num_seqs",
    ),
    TuningRule(
        "train/padding_fraction",
        0.15,
        "{value:.0%} of the trained tokens are padding; raise train.max_tokens_per_microbatch",
    ),
    TuningRule(
        "train/imbalance",
        1.2,
        "the busiest data-parallel rank has {value:.2f} times the mean work; raise data.prompts_per_step, or give the "
        "model more ranks (parallel.tp, pp, cp) and the data fewer",
    ),
    TuningRule(
        "train/bubble_fraction",
        0.2,
        "the pipeline is idle for {value:.0%} of the training; lower train.max_tokens_per_microbatch or parallel.pp, "
        "or set parallel.vpp",
    ),
)


def tuning_advice(history: History, raised: Sequence[Alarm]) -> list[str]:
    """Return one sentence for each rule whose median is above its limit; none after an alarm or in a short run.

    Args:
        history: metrics of all steps.
        raised: alarms of all steps.
    """
    if raised or len(history.steps) < _STEPS:
        return []
    found = []
    for rule in RULES:
        values = history.recent(rule.metric, _STEPS)
        if not values or (rule.unless is not None and history.recent(rule.unless, _STEPS)):
            continue
        value = statistics.median(values)
        if value > rule.limit:
            found.append(rule.text.format(value=value))
    return found
