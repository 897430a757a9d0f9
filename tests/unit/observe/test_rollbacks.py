"""grpo_mega.observe.rollbacks: attempt and prompts of a step after rollbacks, and the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.observe.rollbacks import Rollback, Rollbacks, read_rollbacks, record_rollback
from grpo_mega.types import UserError


def test_steps_after_the_checkpoint_get_a_new_attempt_and_the_next_prompts() -> None:
    """From step 5 back to the checkpoint of step 2: steps 3, 4, 5 use the prompts of steps 6, 7, 8."""
    rollbacks = Rollbacks((Rollback(5, 2, "non_finite", ""),))
    assert [rollbacks.attempt_of(step) for step in range(1, 7)] == [0, 0, 1, 1, 1, 1]
    assert [rollbacks.prompts_step_of(step) for step in range(1, 7)] == [1, 2, 6, 7, 8, 9]


def test_two_rollbacks_add_up_where_both_count() -> None:
    """The second one goes from step 4 back to step 3: step 4 used the prompts of step 7, and now uses those of 8."""
    rollbacks = Rollbacks((Rollback(5, 2, "non_finite", ""), Rollback(4, 3, "non_finite", "")))
    assert [rollbacks.attempt_of(step) for step in range(1, 6)] == [0, 0, 1, 2, 2]
    assert [rollbacks.prompts_step_of(step) for step in range(1, 6)] == [1, 2, 6, 8, 9]


def test_without_a_rollback_a_step_has_its_own_prompts() -> None:
    assert [Rollbacks().prompts_step_of(step) for step in (1, 9)] == [1, 9]
    assert Rollbacks().attempt_of(9) == 0


def test_the_file_returns_what_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "rollbacks.jsonl"
    assert read_rollbacks(path) == Rollbacks()
    first, second = Rollback(5, 2, "non_finite", "the loss\nis", 1.5), Rollback(6, 4, "kl", "far", 2.5)
    rollbacks = record_rollback(path, record_rollback(path, Rollbacks(), first), second)
    assert rollbacks.each == (first, second)
    assert read_rollbacks(path) == rollbacks


@pytest.mark.parametrize("line", ["{", "[]", '{"failed_step": 1}', "1", '{"failed_step": 1, "other": 2}'])
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rollbacks.jsonl"
    record_rollback(path, Rollbacks(), Rollback(5, 2, "kl", "far"))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"rollbacks.jsonl:2 is not a JSON object"):
        read_rollbacks(path)
