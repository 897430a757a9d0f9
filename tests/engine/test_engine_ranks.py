"""The ranks of the engine tests: a failed call does not affect the next one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.helpers.engine_ranks import RankSession, engine_ranks


def number(session: RankSession, value: int) -> int:
    return session.rank + value


def exit_rank_1(session: RankSession) -> None:
    if session.rank == 1:
        os._exit(7)
    time.sleep(60)


def answer_late(session: RankSession) -> str:
    time.sleep(3.0)
    return "late"


def remember(session: RankSession) -> None:
    session.kept["prepared"] = True


def prepared(session: RankSession) -> bool:
    return "prepared" in session.kept


def test_a_failed_call_leaves_no_answer_behind(tmp_path: Path) -> None:
    with engine_ranks(2, tmp_path, remember) as ranks:
        assert ranks.call(number, 10) == [10, 11]
        with pytest.raises(AssertionError, match=r"answer_late failed; no answer from ranks \[0, 1\]"):
            ranks.call(answer_late, timeout_seconds=0.5)
        assert ranks.call(number, 20) == [20, 21]
        with pytest.raises(
            AssertionError, match=r"(?s)exit_rank_1 failed; no answer from ranks \[0\].*rank 1:.*exit code 7"
        ):
            ranks.call(exit_rank_1)
        assert ranks.call(prepared) == [True, True]
