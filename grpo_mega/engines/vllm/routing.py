"""Which experts vLLM's routers choose for each token of a request, taken down inside this process.

vLLM 0.32 has an output for it (`enable_return_routed_experts`), but refuses it without its second model runner
(config/vllm.py, `_verify_aux_output_compatibility`), which does not exist on CPU and samples from its own generators.
So its capturer, a buffer [tokens of a step, L, K] that the routers write into, is bound to the model by hand, before
CUDA graphs are captured, and read after each step of the first runner.

A block of tokens that comes out of the prefix cache is not computed again: its record is that of the request which
computed it, found by the tokens up to the block's end. What is left without a record is a request's last token, which
the engine never reads.
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

from grpo_mega.data.expert_records import narrowed
from grpo_mega.types import UserError

_MAX_PENDING = 64  # steps whose choices are on the device


class Steps(Protocol):
    """What the routers chose in the last step (vLLM's RoutedExpertsCapturer)."""

    def snapshot_routing_data(self, num_tokens: int) -> Tensor:
        """[num_tokens, L, K]."""
        ...


@dataclass(frozen=True)
class Span:
    """Tokens [begin, begin + count) of a request, next to each other among the tokens of a step."""

    request: str
    begin: int
    count: int


@dataclass
class _Open:
    """A request that is being answered: its record so far, and the keys of its prompt's blocks."""

    choices: np.ndarray[Any, np.dtype[np.int16]]
    keys: list[bytes]


class RoutingRecorder:
    """Records of the requests of one engine rank. `block_tokens` are the tokens of a block of the prefix cache."""

    def __init__(self, steps: Steps, *, num_experts: int, block_tokens: int) -> None:
        self._steps, self._num_experts, self._block_tokens = steps, num_experts, block_tokens
        self._open: dict[str, _Open] = {}
        self._blocks: dict[bytes, np.ndarray[Any, np.dtype[np.int16]]] = {}
        self._pending: list[tuple[Tensor, list[Span]]] = []

    def open(self, request: str, prompt: Sequence[int], max_tokens: int) -> None:
        """Record this request from now on."""
        shape = self._steps.snapshot_routing_data(0).shape[1:]
        choices = np.full((len(prompt) + max_tokens, *shape), -1, dtype=np.int16)
        self._open[request] = _Open(choices, list(self._keys(prompt)))

    def step(self, spans: Sequence[Span]) -> None:
        """A step has computed these tokens, in this order."""
        wanted = [span for span in spans if span.request in self._open]
        if not wanted:
            return
        chosen = self._steps.snapshot_routing_data(sum(span.count for span in spans))
        self._pending.append((chosen, list(spans)))
        if len(self._pending) >= _MAX_PENDING:
            self._settle()

    def take(self, request: str, tokens: Sequence[int]) -> Tensor:
        """The record [N, L, K] of a request that is complete; `tokens` are its prompt and its answer.

        N is up to the last token that has one; a token in between without one is marked (data/expert_records.py).
        """
        self._settle()
        choices, size = self._open.pop(request).choices[: len(tokens)], self._block_tokens
        for i, key in enumerate(self._keys(tokens)):
            block = choices[i * size : (i + 1) * size]
            if (block >= 0).all():
                self._blocks.setdefault(key, block)
            elif (known := self._blocks.get(key)) is not None:
                block[:] = np.where(block >= 0, block, known)
        known_tokens = np.flatnonzero(np.all(choices >= 0, axis=(1, 2)))
        end = int(known_tokens[-1]) + 1 if len(known_tokens) else 0
        return narrowed(torch.from_numpy(choices[:end].copy()), self._num_experts)

    def drop(self) -> None:
        """Forget everything: the prefix cache is empty, and no request is open."""
        self._open.clear()
        self._blocks.clear()
        self._pending.clear()

    def _settle(self) -> None:
        """Move what steps have left on the device to their requests."""
        for chosen, spans in self._pending:
            rows, begin = chosen.cpu().numpy().astype(np.int16), 0
            for span in spans:
                opened = self._open.get(span.request)
                if opened is not None:
                    end = min(span.begin + span.count, len(opened.choices))
                    opened.choices[span.begin : end] = rows[begin : begin + end - span.begin]
                    self._offer(opened, end)
                begin += span.count
        self._pending.clear()

    def _offer(self, opened: _Open, end: int) -> None:
        """Blocks of a prompt are there for others as soon as they are computed."""
        for i, key in enumerate(opened.keys[: end // self._block_tokens]):
            block = opened.choices[i * self._block_tokens : (i + 1) * self._block_tokens]
            if key not in self._blocks and (block >= 0).all():
                self._blocks[key] = block

    def _keys(self, tokens: Sequence[int]) -> Iterator[bytes]:
        """Of each whole block: a digest of all tokens up to its end."""
        digest, size = hashlib.sha256(), self._block_tokens
        for begin in range(0, len(tokens) - size + 1, size):
            digest.update(np.asarray(tokens[begin : begin + size], dtype=np.int64).tobytes())
            yield digest.copy().digest()


def bind_routers(model: nn.Module, config: Any) -> Steps:
    """Let the routers of vLLM's `model` write what they choose into a buffer, which is returned. Before CUDA graphs.

    Raises:
        UserError: the model has no experts, or a kernel of it chooses where nobody can look.
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
            f"algorithm.routing_replay=true: engine.kind=vllm cannot tell the experts of {type(model).__name__} "
            f"({error})",
            remedy="set algorithm.routing_replay=false",
        ) from error
    steps: Steps = capturer
    return steps


def record_steps(runner: Any, recorder: RoutingRecorder) -> None:
    """Tell the recorder of every step of vLLM's (first) model runner."""
    execute_model = runner.execute_model

    def recorded(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        output = execute_model(scheduled, *args, **kwargs)
        if scheduled.total_num_scheduled_tokens:
            batch = runner.input_batch
            recorder.step(
                [
                    # vLLM appends -<random> to the ids it was given, which hold no minus
                    Span(name.partition("-")[0], int(begin), scheduled.num_scheduled_tokens[name])
                    for name, begin in zip(batch.req_ids, batch.num_computed_tokens_cpu, strict=False)
                ]
            )
        return output

    runner.execute_model = recorded
