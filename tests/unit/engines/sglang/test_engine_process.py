"""Commands of SGLang's process that need idle schedulers, with a fake of SGLang's Engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_mega.engines.sglang.engine_process import Host
from grpo_mega.engines.sglang.messages import HostSettings, SamplingBatch

IDLE_SECONDS = 30.0


class FakeEngine:
    """The methods of SGLang's Engine that `Host` calls here, with a scheduler that still has a request at first."""

    def __init__(self, *, becomes_idle: bool = True) -> None:
        self.loop = asyncio.new_event_loop()
        self.tokenizer_manager = self
        self.calls: list[Any] = []
        self._becomes_idle, self._idle = becomes_idle, False

    async def flush_cache(self, timeout_s: float | None = None) -> SimpleNamespace:
        """Wait for idle schedulers if there is a timeout, as SGLang does."""
        self._idle |= self._becomes_idle and timeout_s is not None
        self.calls.append(("flush", timeout_s))
        return SimpleNamespace(success=self._idle, message="Timed out waiting for idle state.")

    def release_memory_occupation(self, tags: list[str]) -> None:
        assert self._idle, "SGLang's scheduler ends all processes here"
        self.calls.append(("release", tags))


class FakeHost(Host):
    """`Host` that only notes the commands for the schedulers."""

    def __init__(self, engine: FakeEngine) -> None:
        self._settings = HostSettings({}, Path("answers"), 1, idle_seconds=IDLE_SECONDS)
        self._engine: Any = engine

    def _run_in_schedulers(self, command: str, *_arguments: Any, **_settings: Any) -> list[Any]:
        self._engine.calls.append(command)
        return []


def batch(*, keep_prefixes: bool) -> SamplingBatch:
    return SamplingBatch([], [], seed=5, keep_prefixes=keep_prefixes, expert_choices=False)


def test_memory_is_released_once_the_schedulers_are_idle() -> None:
    engine = FakeEngine()
    FakeHost(engine).release(["kv_cache"])
    assert engine.calls == [("flush", IDLE_SECONDS), ("release", ["kv_cache"])]


def test_prefixes_are_flushed_after_an_update_and_before_a_batch_that_does_not_keep_them() -> None:
    engine = FakeEngine()
    host = FakeHost(engine)
    host.finish_update(3)
    host.sample(batch(keep_prefixes=False))
    host.sample(batch(keep_prefixes=True))
    flush = ("flush", IDLE_SECONDS)
    assert engine.calls == ["finish_update", flush, flush, "seed", "seed"]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("release", (["kv_cache"],)), ("finish_update", (3,)), ("sample", (batch(keep_prefixes=False),))],
)
def test_schedulers_that_do_not_become_idle_are_an_error(command: str, arguments: tuple[Any, ...]) -> None:
    engine = FakeEngine(becomes_idle=False)
    with pytest.raises(RuntimeError, match=rf"{command}: .* after 30 s"):
        getattr(FakeHost(engine), command)(*arguments)
    assert ("release", ["kv_cache"]) not in engine.calls
