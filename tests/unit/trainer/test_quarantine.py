"""grpo_mega.trainer.quarantine: content of reason.json, and a folder that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from grpo_mega.trainer.guard_report import GuardReport, HeldRule
from grpo_mega.trainer.quarantine import quarantine_reason, write_reason
from grpo_mega.trainer.step_metrics import StepResult


def result_of(attempt: int) -> StepResult:
    table = SimpleNamespace(prompt_index=np.array([7, 7, 9, 9]), group_size=2, policy_version=np.array([4, 4, 4, 4]))
    held = HeldRule("non_finite", "quarantine", "the loss of microbatch 1 on rank 0 is not finite")
    report = GuardReport({}, (held,), np.array([False, True]), prompts_step=5, attempt=attempt)
    found: Any = SimpleNamespace(step=3, groups=SimpleNamespace(table=table), guard=report)
    return cast("StepResult", found)


def test_the_reason_names_rules_groups_seeds_and_weights(tmp_path: Path) -> None:
    reason = quarantine_reason(result_of(attempt=2), run_seed=11, weights_digest="abc")
    write_reason(tmp_path / "quarantine" / "step_000003", reason)
    assert json.loads((tmp_path / "quarantine" / "step_000003" / "reason.json").read_text()) == {
        "step": 3,
        "findings": [
            {
                "rule": "non_finite",
                "action": "quarantine",
                "reason": "the loss of microbatch 1 on rank 0 is not finite",
            }
        ],
        "groups": [1],
        "prompt_indices": [9],
        "prompts_step": 5,
        "attempt": 2,
        "seed_of": ["train", 11, 3, "attempt", 2],
        "policy_versions": [4],
        "weights_digest": "abc",
    }


def test_the_first_attempt_has_the_seeds_of_a_run_without_rollbacks() -> None:
    assert quarantine_reason(result_of(attempt=0), 11, None)["seed_of"] == ["train", 11, 3]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "quarantine").write_text("a file")
    with pytest.raises(RuntimeError, match=r"reason.json cannot be written .* the same command continues"):
        write_reason(tmp_path / "quarantine" / "step_000003", {})
