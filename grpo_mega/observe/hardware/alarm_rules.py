"""Rules of the alarms that concern machines: slow phases, ranks and GPUs, errors, disk and memory.

Asserted by tests/unit/observe/test_alarms.py.
"""

from __future__ import annotations

import statistics

from grpo_mega.observe.alarm_rule import AlarmRule, Found
from grpo_mega.observe.history import History

_PHASES = ("rollout", "log_probs", "train", "sync")


def _stalled_phase(history: History) -> Found | None:
    """One phase took six times as long per token as usual, and at least half a minute."""
    for phase in _PHASES:
        seconds, usual = history.last(f"time/{phase}_seconds"), _seconds_of_tokens(history, phase, 20, skip=1)
        last = _seconds_of_tokens(history, phase, 1)
        if seconds is None or seconds < 30 or not last or len(usual) < 10:
            continue
        limit = 6 * statistics.median(usual)
        if last[0] > limit > 0:
            text = f"{phase} took {seconds:.0f} s, {6 * last[0] / limit:.1f} times the median of the 20 steps before"
            return Found(6 * last[0] / limit, 6.0, text)
    return None


def _slow_phase(history: History) -> Found | None:
    """One phase took twice as long per token as usual in all steps of ten minutes.

    A shorter delay is no alarm: other programs of a shared machine come and go.
    """
    steps = _steps_of_the_last(600.0, history)
    if steps is None:
        return None
    for phase in _PHASES:
        seconds, usual = _seconds_of_tokens(history, phase, steps), _seconds_of_tokens(history, phase, 100, skip=steps)
        if len(seconds) < steps or len(usual) < 10:
            continue
        limit = 2 * statistics.median(usual)
        if min(seconds) > limit > 0 and history.recent(f"time/{phase}_seconds", 1)[0] > 0.5:
            ratio = 2 * statistics.median(seconds) / limit
            text = f"for {steps} steps {phase} takes {ratio:.1f} times the median of the steps before"
            return Found(ratio, 2.0, text)
    return None


def _seconds_of_tokens(history: History, phase: str, steps: int, skip: int = 0) -> list[float]:
    """Return the seconds of a phase per token of its step, of the last `steps` steps before the last `skip`.

    A weight sync has the same work in each step: its seconds are not divided. Empty if a step lacks a value.
    """
    seconds = history.recent(f"time/{phase}_seconds", steps, skip)
    tokens = history.recent("rollout/tokens", steps, skip)
    if len(seconds) != len(tokens) or min(tokens, default=0.0) <= 0:
        return []
    return seconds if phase == "sync" else [s / t for s, t in zip(seconds, tokens, strict=True)]


def _steps_of_the_last(seconds: float, history: History) -> int | None:
    """Return how many last steps took at least `seconds` together, at least 5; None if 1,000 steps did not."""
    total = 0.0
    for count, step_seconds in enumerate(reversed(history.recent("time/step_seconds", 1000)), 1):
        total += step_seconds
        if total >= seconds:
            return max(5, count)
    return None


def _slow_rank(history: History) -> Found | None:
    """One rank needs twice as long for its own work as the others, and is the slowest in each of the last steps."""
    ratios, ranks = history.recent("rank/slowest_ratio", 5), history.recent("rank/slowest", 5)
    seconds = history.last("rank/slowest_seconds")
    if len(ratios) < 5 or len(set(ranks)) != 1 or seconds is None or seconds < 0.1:
        return None
    ratio = statistics.median(ratios)
    if ratio <= 1.8:
        return None
    text = f"rank {ranks[0]:.0f} works {seconds:.1f} s on its part of a step, {ratio:.1f} times as long as the others"
    return Found(ratio, 1.8, text)


def _throttled_gpu(history: History) -> Found | None:
    name = "gpu/throttled_fraction"
    value = history.last(f"{name}_max")
    value = history.last(f"{name}_mean") if value is None else value  # a single GPU
    if value is None or value <= 0.2:
        return None
    return Found(value, 0.2, f"heat or power slows {_gpu_of(history, name)} in {value:.0%} of the time")


def _slow_gpu(history: History) -> Found | None:
    """The multiprocessors of one GPU run slower than those of the others, which do the same work."""
    lowest, mean_clock = history.last("gpu/sm_clock_mhz_min"), history.last("gpu/sm_clock_mhz_mean")
    if lowest is None or mean_clock is None or lowest >= 0.85 * mean_clock:
        return None
    place = _gpu_of(history, "gpu/sm_clock_mhz")
    text = f"the clock of {place} is {lowest:.0f} MHz, that of all GPUs {mean_clock:.0f} MHz"
    return Found(lowest, 0.85 * mean_clock, text)


def _gpu_errors(history: History) -> Found | None:
    for name, what in (("gpu/xid_events", "critical errors (Xid)"), ("gpu/ecc_uncorrected", "memory errors")):
        mean_count, most = history.last(f"{name}_mean"), history.last(f"{name}_max")
        count = mean_count if most is None else most
        if count:
            return Found(count, 0.0, f"{_gpu_of(history, name)} reports {count:.0f} {what}")
    return None


def _gpu_of(history: History, name: str) -> str:
    node, gpu = history.last(f"{name}_outlier_node"), history.last(f"{name}_outlier_gpu")
    return "every GPU" if node is None or gpu is None else f"GPU {gpu:.0f} of node {node:.0f}"


def _disk(history: History) -> Found | None:
    value = history.last("host/disk_free_fraction")
    if value is None or value >= 0.05:
        return None
    return Found(value, 0.05, f"{value:.1%} of the disk of the run folder is free")


def _memory(history: History) -> Found | None:
    """Rank 0 grows: its memory after the first 50 steps, and steadily."""
    values = history.all("host/memory_bytes")
    if len(values) < 100:
        return None
    settled, last = max(values[30:50]), min(values[-10:])
    limit = settled * 1.2 + 2**29
    if last <= limit:
        return None
    grown = f"{settled / 2**30:.1f} to {last / 2**30:.1f} GiB"
    return Found(last, limit, f"the memory of rank 0 grew from {grown} after its first 50 steps")


MACHINE_RULES: tuple[AlarmRule, ...] = (
    AlarmRule("stalled phase", 1, "the log of that time, and the file system and the network", _stalled_phase),
    AlarmRule("slow phase", 1, "other programs on the nodes, rank/slowest, and the gauges of the engine", _slow_phase),
    AlarmRule("slow rank", 3, "other programs and the clocks on the rank's node", _slow_rank),
    AlarmRule(
        "throttled GPU", 3, "gpu/temperature_celsius, gpu/power_watts and the cooling of the node", _throttled_gpu
    ),
    AlarmRule("slow GPU", 5, "clock limits of the GPU (nvidia-smi -q -d CLOCK,PERFORMANCE)", _slow_gpu),
    AlarmRule("GPU errors", 1, "dmesg and nvidia-smi -q of the node; take the node out of the job", _gpu_errors),
    AlarmRule("disk nearly full", 1, "rollouts/ and checkpoints/ of the run folder, checkpoint.keep", _disk),
    AlarmRule("memory grows", 5, "own rewards and environments: do they keep what they have seen?", _memory),
)
