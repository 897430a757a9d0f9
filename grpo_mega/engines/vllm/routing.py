"""Recording of the experts that vLLM's routers choose for each token of a request, inside this process.

vLLM 0.32 has an output for them (`enable_return_routed_experts`), but supports it only with its second model runner
(config/vllm.py, `_verify_aux_output_compatibility`). That runner does not exist on CPU and samples from its own
generators. Therefore vLLM's capturer, a buffer [tokens of a step, L, K] that the routers write, is bound to the model
here, before CUDA graphs are captured, and read after each step of the first runner.

A block of tokens from the prefix cache is not computed again. Its record is that of the request which computed it,
found by the tokens up to the end of the block. Only the last token of a request has no record: the engine never reads
it as input.
Asserted by tests/engine/test_engine_routing.py and tests/unit/engines/vllm/test_routing.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from grpo_mega.data.expert_records import narrow_record
from grpo_mega.types import UserError

_MAX_PENDING = 64  # steps whose choices are still on the device


class Steps(Protocol):
    """The choices of the routers in the last step (vLLM's RoutedExpertsCapturer)."""

    def snapshot_routing_data(self, num_tokens: int) -> Tensor:
        """Return the chosen experts [num_tokens, L, K]."""
        ...


@dataclass(frozen=True)
class Span:
    """Tokens [begin, begin + count) of a request, which are contiguous among the tokens of a step."""

    request: str
    begin: int
    count: int


@dataclass
class _RunningRequest:
    """A request that is still running."""

    choices: np.ndarray[Any, np.dtype[np.int16]]
    """Its record so far, [tokens, L, K]; -1: no choice yet."""
    keys: list[bytes]
    """The keys of the blocks of its prompt."""


class RoutingRecorder:
    """Records of the requests of one engine rank; `block_tokens` is the block size of the prefix cache."""

    def __init__(self, steps: Steps, *, num_experts: int, block_tokens: int) -> None:
        self._steps, self._num_experts, self._block_tokens = steps, num_experts, block_tokens
        self._running: dict[str, _RunningRequest] = {}
        self._blocks: dict[bytes, np.ndarray[Any, np.dtype[np.int16]]] = {}
        self._pending: list[tuple[Tensor, list[Span]]] = []

    def open(self, request: str, prompt: Sequence[int], max_tokens: int) -> None:
        """Start to record a request."""
        shape = self._steps.snapshot_routing_data(0).shape[1:]
        choices = np.full((len(prompt) + max_tokens, *shape), -1, dtype=np.int16)
        self._running[request] = _RunningRequest(choices, list(self._keys(prompt)))

    def step(self, spans: Sequence[Span]) -> None:
        """Record a step that computed these tokens, in this order."""
        wanted = [span for span in spans if span.request in self._running]
        if not wanted:
            return
        chosen = self._steps.snapshot_routing_data(sum(span.count for span in spans))
        self._pending.append((chosen, list(spans)))
        if len(self._pending) >= _MAX_PENDING:
            self._settle()

    def take(self, request: str, tokens: Sequence[int]) -> Tensor:
        """Return the record [N, L, K] of a completed request; `tokens` are its prompt and its completion.

        N counts up to the last token with a record; earlier tokens without one are marked (data/expert_records.py).
        """
        self._settle()
        choices, size = self._running.pop(request).choices[: len(tokens)], self._block_tokens
        for i, key in enumerate(self._keys(tokens)):
            block = choices[i * size : (i + 1) * size]
            if (block >= 0).all():
                self._blocks.setdefault(key, block)
            elif (known := self._blocks.get(key)) is not None:
                block[:] = np.where(block >= 0, block, known)
        known_tokens = np.flatnonzero(np.all(choices >= 0, axis=(1, 2)))
        end = int(known_tokens[-1]) + 1 if len(known_tokens) else 0
        return narrow_record(torch.from_numpy(choices[:end].copy()), self._num_experts)

    def drop(self) -> None:
        """Discard all records, after the prefix cache was emptied; no request is running."""
        self._running.clear()
        self._blocks.clear()
        self._pending.clear()

    def _settle(self) -> None:
        """Move the choices of finished steps from the device to the records of their requests."""
        for chosen, spans in self._pending:
            rows, begin = chosen.cpu().numpy().astype(np.int16), 0
            for span in spans:
                running = self._running.get(span.request)
                if running is not None:
                    end = min(span.begin + span.count, len(running.choices))
                    running.choices[span.begin : end] = rows[begin : begin + end - span.begin]
                    self._share_blocks(running, end)
                begin += span.count
        self._pending.clear()

    def _share_blocks(self, running: _RunningRequest, end: int) -> None:
        """Make the computed blocks of a prompt available to other requests."""
        for i, key in enumerate(running.keys[: end // self._block_tokens]):
            block = running.choices[i * self._block_tokens : (i + 1) * self._block_tokens]
            if key not in self._blocks and (block >= 0).all():
                self._blocks[key] = block

    def _keys(self, tokens: Sequence[int]) -> Iterator[bytes]:
        """Yield the key of each whole block: a digest of all tokens up to its end."""
        digest, size = hashlib.sha256(), self._block_tokens
        for begin in range(0, len(tokens) - size + 1, size):
            digest.update(np.asarray(tokens[begin : begin + size], dtype=np.int64).tobytes())
            yield digest.copy().digest()


def bind_routers(model: nn.Module, config: Any) -> Steps:
    """Make the routers of vLLM's `model` write their choices into a buffer, and return it. Call before CUDA graphs.

    Raises:
        UserError: the model has no experts, or one of its kernels does not expose its choices.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
        RoutedExpertsCapturer,
        bind_routed_experts_capturer,
    )

    try:
        capturer = RoutedExpertsCapturer(config.scheduler_config.max_num_batched_tokens, config)
        bind_routed_experts_capturer(model, capturer)
    except ValueError as error:
        raise UserError(
            f"algorithm.routing_replay=true: engine.kind=vllm cannot record the experts of {type(model).__name__} "
            f"({error})",
            remedy="set algorithm.routing_replay=false",
        ) from error
    steps: Steps = capturer
    return steps


def record_steps(runner: Any, recorder: RoutingRecorder) -> None:
    """Report every step of vLLM's (first) model runner to the recorder."""
    execute_model = runner.execute_model

    def recorded(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        output = execute_model(scheduled, *args, **kwargs)
        if scheduled.total_num_scheduled_tokens:
            batch = runner.input_batch
            recorder.step(
                [
                    # vLLM appends -<random> to the request ids, which contain no hyphen
                    Span(name.partition("-")[0], int(begin), scheduled.num_scheduled_tokens[name])
                    for name, begin in zip(batch.req_ids, batch.num_computed_tokens_cpu, strict=False)
                ]
            )
        return output

    runner.execute_model = recorded
