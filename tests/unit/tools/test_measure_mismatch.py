"""tools/measure_mismatch.py: reading of run folders, tables, and the page that holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.step_columns import write_step
from tools.measure_mismatch import (
    CHANGES,
    HEALTHY,
    RunMismatch,
    StepMismatch,
    healthy_table,
    main,
    mean_table,
    quantile,
    read,
    report,
    runs_of,
    wrong_table,
)

MEASUREMENTS = Path(__file__).resolve().parents[3] / "docs" / "measurements"


def row(sampled: list[float], old: list[float], mask: list[bool] | None = None, prompt: int = 0) -> dict[str, Any]:
    return {
        "prompt_index": prompt, "prompt_ids": [1], "completion_ids": list(range(len(sampled))),
        "sampler_log_probs": sampled, "old_log_probs": old, "loss_mask": mask,
    }  # fmt: skip


def test_a_run_is_read_by_hand(tmp_path: Path) -> None:
    """The masked token and the unlikely one do not count; 2.5 nats are more than four times the bound of bf16."""
    masked = row([-1.0, 0.0, -1.0], [-1.25, 0.0, -1.75], [True, False, True])
    write_step(tmp_path, 1, [masked, row([-9.0], [-20.0])])
    write_step(tmp_path, 2, [row([-1.0], [-3.5]), row([-1.0], [-1.0], prompt=1)])
    found = read(tmp_path, "heads", "bf16", 7)
    assert (found.change, found.dtype, found.seed, found.num_tokens, found.largest) == ("heads", "bf16", 7, 4, 2.5)
    assert found.steps == (StepMismatch(0.5, 0.75, 2, 1, False), StepMismatch(1.25, 2.5, 2, 1, True))
    assert found.quantiles == (0.25, 2.5, 2.5)


def test_a_quantile_is_the_smallest_value_that_the_fraction_does_not_exceed() -> None:
    assert [quantile(range(1, 1001), fraction) for fraction in (0.5, 0.999, 0.9999)] == [500, 999, 1000]


def run(change: str, dtype: str, *steps: StepMismatch) -> RunMismatch:
    return RunMismatch(change, dtype, 1, (1e-5, 0.1, 0.25), steps)


def test_the_tables_by_hand() -> None:
    """A stale layer is right at the first step, which is left out of its values."""
    calm, wild = StepMismatch(0.001, 0.4, 1000, 0, False), StepMismatch(0.02, 0.6, 1000, 3, True)
    runs = [run(change, dtype, calm, wild) for change in (HEALTHY, *CHANGES) for dtype in ("fp32", "bf16")]
    assert healthy_table(runs[:2]).splitlines()[2:] == [
        "| fp32 | 1 | 2 | 2,000 | 1e-05 | 0.1 | 0.25 | 0.6 | 1 | 1 |",
        "| bf16 | 1 | 2 | 2,000 | 1e-05 | 0.1 | 0.25 | 0.6 | 1 | 1 |",
    ]
    assert (
        wrong_table(runs).splitlines()[2] == "| one row of the embedding is another row | 0.6; step 2 | 0.6; step 2 |"
    )
    calm_runs = [run(change, dtype, calm, calm) for change in CHANGES for dtype in ("fp32", "bf16")]
    assert "| 0.4; not in 2 steps | 0.4; not in 2 steps |" in wrong_table(calm_runs)
    assert mean_table(runs).splitlines()[2] == "| healthy | 0.001 to 0.02 (2 steps) | 0.001 to 0.02 (2 steps) |"


def test_the_page_holds_the_tables_of_the_committed_results() -> None:
    runs = runs_of(json.loads((MEASUREMENTS / "mismatch.json").read_text()))
    page = (MEASUREMENTS / "mismatch.md").read_text()
    for table in report(runs).split("\n\n"):
        assert table.strip() in page


@pytest.mark.parametrize("options", [["--steps", "0"], ["--wrong-steps", "1"]])
def test_too_few_steps_are_rejected_before_a_run(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    assert options[0] + "=" + options[1] in capsys.readouterr().err
