"""A reward whose module makes the real vLLM engine fail in the middle of a request.

The variable FAILING_ENGINE says how: `raises` (an exception on the last rank only), `nan` (a log-prob of every rank is
not a number), `always` (an exception on the last rank in every request). FAILING_REQUEST is the number of the request
that fails, 2 by default.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import replace

import numpy as np

from grpo_mega.engines.vllm.engine import VllmEngine
from grpo_mega.rewards.builtin.exact import exact
from grpo_mega.types import Completion, Prompt, SamplingRequest

__all__ = ["exact"]

_rollouts = VllmEngine._rollouts
_kind = os.environ.get("FAILING_ENGINE", "")
_requests = [0]


def _fail_in_the_middle(
    engine: VllmEngine, prompts: Sequence[Prompt], sampling: SamplingRequest
) -> Generator[tuple[int, int, Completion], None, None]:
    _requests[0] += 1
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    is_due = _requests[0] == int(os.environ.get("FAILING_REQUEST", "2")) or _kind == "always"
    for number, (position, member, completion) in enumerate(_rollouts(engine, prompts, sampling)):
        if is_due and number == 3 and _kind == "nan":
            completion = replace(completion, sampler_log_probs=np.full(len(completion.token_ids), np.nan))
        if is_due and number >= 1 and is_last and _kind in ("raises", "always"):
            raise RuntimeError("the engine fails on purpose")
        yield position, member, completion


if _kind:
    VllmEngine._rollouts = _fail_in_the_middle  # type: ignore[method-assign]
