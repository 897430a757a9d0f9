"""Reduces the gauges of all engine replicas to metrics of a step, and computes the seconds that each side waits.

Asserted by tests/unit/observe/test_engine_metrics.py and, with real engines, tests/engine/test_engine_contract.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_mega.observe.engine_gauges import EngineGauges


@dataclass(frozen=True)
class EngineWork:
    """Work of the engine of one prompt shard in a step, without evaluations; on the first rank of the shard.

    Attributes:
        replica: number of the engine replica; with `engine.dp` several shards share one.
        gauges: readings of the engine.
        environment_failures: environments that timed out, crashed or raised; each ends its rollout.
        tool_errors: results of the environment that report an error of the tool to the policy.
    """

    replica: int
    gauges: EngineGauges
    environment_failures: int = 0
    tool_errors: int = 0


def engine_metrics(works: Sequence[tuple[EngineWork, float]]) -> dict[str, float]:
    """Return the metrics of all engines; nothing without one.

    Means are over the readings of all engines.

    Args:
        works: of each engine, and the seconds in which it sampled.
    """
    if not works:
        return {}
    total = EngineGauges()
    tokens, seconds = dict[int, int](), dict[int, float]()
    for work, sampling in works:
        total.add(work.gauges)
        tokens[work.replica] = tokens.get(work.replica, 0) + work.gauges.completion_tokens
        seconds[work.replica] = max(seconds.get(work.replica, 0.0), sampling)
    found = {
        "rollout/environment_failures": float(sum(work.environment_failures for work, _ in works)),
        "rollout/tool_errors": float(sum(work.tool_errors for work, _ in works)),
        "engine/preemptions": float(total.preemptions),
    }
    if total.readings:
        found |= {
            "engine/running_requests_mean": total.running / total.readings,
            "engine/running_requests_max": float(total.most_running),
            "engine/waiting_requests_mean": total.waiting / total.readings,
            "engine/waiting_requests_max": float(total.most_waiting),
            "engine/kv_cache_fraction_mean": total.kv_cache / total.readings,
            "engine/kv_cache_fraction_max": total.most_kv_cache,
        }
    if total.prompt_tokens:
        found["engine/prefix_hit_fraction"] = total.cached_tokens / total.prompt_tokens
    for replica in sorted(tokens):
        if seconds[replica] > 0:
            found[f"engine/tokens_per_second/{replica}"] = tokens[replica] / seconds[replica]
    return found


def wait_metrics(steps: Sequence[tuple[dict[str, float], float, float]]) -> dict[str, float]:
    """Return the seconds of a step in which policy and engines waited for each other, means over the ranks.

    Args:
        steps: of each rank: seconds of each phase, seconds of the step, and seconds in which its engine sampled.
    """
    if not any(sampling > 0 for _, _, sampling in steps):
        return {}
    policy = [phases.get("rollout", 0.0) + phases.get("reward", 0.0) for phases, _, _ in steps]
    engine = [max(0.0, total - phases.get("evaluation", 0.0) - sampling) for phases, total, sampling in steps]
    return {
        "wait/policy_seconds": statistics.fmean(policy),
        "wait/engine_seconds": statistics.fmean(engine),
    }
