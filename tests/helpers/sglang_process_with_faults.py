"""The real SGLang process (engines/sglang/engine_process.py) with a command that keeps a request in the scheduler."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from grpo_mega.engines.sglang import engine_process
from grpo_mega.engines.sglang.cpu import ENVIRONMENT, install_stubs

if __name__ in ("__main__", "__mp_main__") and ENVIRONMENT.items() <= os.environ.items():
    install_stubs()


class HostWithRunningRequest(engine_process.Host):
    """`Host` whose commands can run while the scheduler still has a request."""

    def while_running(self, num_tokens: int, command: str, *arguments: Any) -> int:
        """Run a command after the first of `num_tokens` tokens; return how many tokens the request has at the end."""
        engine, started = self._engine, asyncio.Event()
        lengths: list[int] = []

        async def receive() -> None:
            stream = await engine.async_generate(
                input_ids=[[3, 4, 5]],
                sampling_params=[{"max_new_tokens": num_tokens, "ignore_eos": True}],
                stream=True,
            )
            async for part in stream:
                lengths.append(len(part["output_ids"]))
                started.set()

        request = engine.loop.create_task(receive())
        engine.loop.run_until_complete(started.wait())
        getattr(self, command)(*arguments)
        engine.loop.run_until_complete(request)
        return lengths[-1]


if __name__ == "__main__":
    engine_process.Host = HostWithRunningRequest  # type: ignore[misc]  # `main` constructs it
    engine_process.main(int(sys.argv[1]))
