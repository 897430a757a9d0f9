"""The ranks of the engine tests: what one call breaks, the next one does not meet."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.helpers.engine_ranks import RankSession, engine_ranks


def number(session: RankSession, value: int) -> int:
    return session.rank + value


def dies(session: RankSession) -> None:
    if session.rank == 1:
        os._exit(7)
    time.sleep(60)


def late(session: RankSession) -> str:
    time.sleep(3.0)
    return "late"


def remember(session: RankSession) -> None:
    session.kept["prepared"] = True


def prepared(session: RankSession) -> bool:
    return "prepared" in session.kept


def test_a_call_that_fails_leaves_no_answer_behind_and_the_next_one_gets_its_own(tmp_path: Path) -> None:
    with engine_ranks(2, tmp_path, remember) as ranks:
        assert ranks.call(number, 10) == [10, 11]
        with pytest.raises(AssertionError, match=r"late failed; no answer from ranks \[0, 1\]"):
            ranks.call(late, timeout_seconds=0.5)
        assert ranks.call(number, 20) == [20, 21]
        with pytest.raises(AssertionError, match=r"(?s)dies failed; no answer from ranks \[0\].*rank 1:.*exit code 7"):
            ranks.call(dies)
        assert ranks.call(prepared) == [True, True]
