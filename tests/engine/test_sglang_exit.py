"""A scheduler of SGLang that is killed during an update; the file is the last one with this engine, which it ends."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.helpers.engine_contract import ONLY_SGLANG, PROMPTS, SAMPLING, push
from tests.helpers.engine_ranks import EngineRanks, RankSession


def kill_scheduler_during_an_update(session: RankSession, folder: Path) -> tuple[list[str], list[int]]:
    """Kill a scheduler before the end of an update; return the error messages and the processes that are left."""
    host = psutil.Process(session.engine._process.pid)
    members = [host, *host.children(recursive=True)]
    (scheduler,) = [each for each in members if "scheduler" in " ".join(each.cmdline())]
    push(session, folder, 1, end=False)
    scheduler.kill()
    messages = []
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            session.engine.sink.end_update(1)
        messages.append(str(caught.value))
    with pytest.raises(RuntimeError, match="before the weights are complete"):
        session.engine.generate(PROMPTS, SAMPLING)
    psutil.wait_procs(members, timeout=10)
    session.engine.close()
    session.engine, session.opened = None, None
    return messages, [each.pid for each in members if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@ONLY_SGLANG
def test_sglang_that_dies_during_an_update_is_an_error_and_leaves_no_process(
    engine: EngineRanks, models: dict[str, Path]
) -> None:
    ((messages, left),) = engine.call(kill_scheduler_during_an_update, models["other"])
    assert left == []
    for message in messages:
        assert "SGLang" in message
        assert "exited" in message
        assert "rank 0" in message
    assert "the end of " in messages[0]
