"""Simulates the asynchronous side of tools/bench_async.py with the lengths and the times of its synchronous side.

The costs of the engine have the ratios that tools/bench_simulator.py has fitted (docs/measurements/simulator.md). One
factor scales them, so that the simulated sampling of the synchronous steps takes as long as the measured sampling. The
simulation has no slices: the costs of a call are divided by the decode steps of a slice.
Asserted by tests/unit/tools/test_simulated_servers.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_mega.config.load import load_config
from grpo_mega.config.schema import Config
from grpo_mega.planner.simulation.asynchronous import AsynchronousRun
from grpo_mega.planner.simulation.costs import EngineCost, PolicyCost
from grpo_mega.planner.simulation.lengths import recorded_lengths
from grpo_mega.planner.simulation.synchronous import decode_seconds, first_steps
from grpo_mega.planner.simulation.workload import SimulatedJob
from tools.step_sides.compared_runs import ROOT, CountedSteps

CALL, ROLLOUT, STEP, TOKEN = 7.7e-4, 1.10e-3, 5.59e-3, 6.42e-5
"""Fitted seconds per call, per rollout of a call, per decode step, and per rollout in a decode step."""
CACHED, COMPUTED = 8.3e-7, 3.38e-5
"""Fitted seconds per cached token that a decode step reads, and per token whose KV cache is computed."""
MEAN_PROMPT = 12  # tokens
STEPS, WARM_STEPS = 100, 20


def engine_cost(factor: float, max_running: int, slice_tokens: int | None = None) -> EngineCost:
    """Return the costs of the engine.

    Args:
        factor: of all costs.
        max_running: most rollouts that run at the same time.
        slice_tokens: decode steps of a call; None: a call samples whole answers.
    """
    numbers, zeros = range(max_running + 1), [0.0] * (max_running + 1)
    per_step = 0.0 if slice_tokens is None else factor / slice_tokens
    return EngineCost(
        read=[factor * (STEP + TOKEN * n) for n in numbers],
        compute=zeros,
        other=[per_step * (CALL + ROLLOUT * n) for n in numbers],
        cached_token=factor * CACHED,
        prefill_token=factor * COMPUTED,
        call=factor * CALL,
        submitted_rollout=factor * ROLLOUT,
    )


def sampling_seconds(groups: NDArray[np.int64], cost: EngineCost) -> float:
    """Return the simulated seconds of the sampling of a synchronous step; `groups` [P, G] has the lengths."""
    lengths = groups.ravel()
    starts = first_steps(lengths, cost.max_running)
    decoding = decode_seconds(cost, starts, lengths, np.full(lengths.size, MEAN_PROMPT))
    prefill = cost.prefill_token * len(groups) * MEAN_PROMPT
    return decoding + prefill + cost.call + cost.submitted_rollout * lengths.size


def simulate_steps(known: CountedSteps, max_staleness: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the mean values of simulated asynchronous steps.

    Args:
        known: measured synchronous steps.
        max_staleness: `train.max_staleness`.
        arguments: config of the runs, and its overrides.
    """
    config = load_config(ROOT / arguments[0], list(arguments[1:]))
    job, factor = simulated_job(known, config)
    mode = AsynchronousRun(job, max_staleness, seed=0).run(STEPS, WARM_STEPS)
    return {
        "step_seconds": mode.step_seconds,
        "updates_per_hour": 3600.0 / mode.update_seconds,
        "staleness_mean": mode.staleness_mean,
        "dropped_groups": mode.dropped_groups,
        "tokens_per_update": mode.tokens_per_update - job.group_size * job.prompts_per_step * MEAN_PROMPT,
        "policy_seconds": job.policy.seconds(mode.tokens_per_step, 0.0),
        "engine_factor": factor,
    }


def simulated_job(known: CountedSteps, config: Config) -> tuple[SimulatedJob, float]:
    """Return the job whose synchronous steps take as long as the measured ones, and the factor of the engine's costs.

    Args:
        known: measured synchronous steps.
        config: of the run; its sections sampling, data, train and engine are read.
    """
    running = config.engine.max_num_seqs
    unscaled = engine_cost(1.0, running)
    sampling = statistics.mean(line["time/rollout_seconds"] for line in known.lines)
    factor = sampling / statistics.mean(sampling_seconds(groups, unscaled) for groups in known.lengths)
    sync = statistics.mean(line["time/sync_seconds"] for line in known.lines)
    tokens = statistics.mean(groups.sum() + groups.size * MEAN_PROMPT for groups in known.lengths)
    training = statistics.mean(known.seconds) - sampling - sync
    rows = [row for groups in known.lengths for row in groups]
    job = SimulatedJob(
        recorded_lengths("synchronous steps", rows, config.sampling.max_tokens),
        MEAN_PROMPT,
        config.data.prompts_per_step,
        config.sampling.group_size,
        config.train.updates_per_step,
        1,
        engine_cost(factor, running, config.background_slice_tokens),
        PolicyCost(sync, float(training / tokens), sync=sync),
        server_devices=1,
    )
    return job, float(factor)
