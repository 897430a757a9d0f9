"""Writes why the rollouts of a step are in quarantine, beside the parts that rollout_parts.py writes.

Asserted by tests/unit/trainer/test_quarantine.py and tests/e2e/test_guard.py.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from grpo_mega.observe.atomic_files import to_json, write_atomically
from grpo_mega.rollout.dynamic_sampling import sampling_seed
from grpo_mega.trainer.step_metrics import StepResult

REASON_FILE = "reason.json"


def quarantine_reason(result: StepResult, run_seed: int, weights_digest: str | None) -> dict[str, Any]:
    """Return the content of `reason.json`.

    `seed_of` are the values from which, with wave and prompt shard, the seeds of the engines were derived;
    `weights_digest` is that of the weights that sampled the rollouts.

    Args:
        result: a step with rollouts in quarantine.
        run_seed: run.seed.
        weights_digest: policy digest of the weight sync before the step; None: not known.
    """
    report, table = result.guard, result.groups.table
    assert report.quarantined is not None, "no rollout of the step is in quarantine"
    groups = np.flatnonzero(report.quarantined)
    return {
        "step": result.step,
        "findings": [asdict(finding) for finding in report.findings],
        "groups": groups.tolist(),
        "prompt_indices": table.prompt_index[groups * table.group_size].tolist(),
        "prompts_step": report.prompts_step or result.step,
        "attempt": report.attempt,
        "seed_of": list(sampling_seed(run_seed, result.step, report.attempt)),
        "policy_versions": np.unique(table.policy_version).tolist(),
        "weights_digest": weights_digest,
    }


def write_reason(folder: Path, reason: dict[str, Any]) -> None:
    """Write `reason.json` to the folder of the step, which is created.

    Raises:
        RuntimeError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / REASON_FILE, to_json(reason, indent=2) + "\n")
    except OSError as error:
        raise RuntimeError(
            f"{folder / REASON_FILE} cannot be written ({error}). The run stops; after freeing space, the same command "
            "continues from the newest checkpoint"
        ) from error
