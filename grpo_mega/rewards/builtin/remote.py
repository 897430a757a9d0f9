"""Reward `remote`: values from the user's own server, many completions per request.

There are two protocols. `rewards`: POST `{"rows": [{"prompt", "completion", "messages", ...}, ...]}`, with the inputs
of a reward (inputs.py) that `inputs` names; the answer is `{"rewards": [0.5, ...]}` in the same order, with null for a
missing value. `classify`: a reward model that an engine
serves in its pooling mode (vLLM's `/classify`): POST `{"model", "input": [prompt + completion, ...]}`; the answer is
`{"data": [{"index", "probs": [..]}, ...]}`. The value is the last probability: the second of two classes, or the only
one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_mega.rewards.base import batched_reward
from grpo_mega.rewards.batched import BatchScorer, ScoringRow, ThreadedScorer
from grpo_mega.rewards.http_client import RewardServer, asks_server, check_server, sendable
from grpo_mega.rewards.inputs import INPUTS
from grpo_mega.types import UserError

PROTOCOLS = ("rewards", "classify")

_MAX_TEXT_CHARACTERS = 200_000
_CONCURRENCY = 4


@asks_server(concurrency=_CONCURRENCY)
def check_remote_args(
    server: RewardServer,
    low: float = 0.0,
    high: float = 1.0,
    protocol: str = "rewards",
    model: str | None = None,
    batch_size: int = 16,
    inputs: Sequence[str] = INPUTS,
) -> None:
    """Check the arguments of `remote`, and that its server accepts connections.

    Raises:
        UserError: names the argument.
    """
    numbers = all(type(end) in (int, float) and math.isfinite(end) for end in (low, high))
    if not numbers or not low < high:
        raise UserError(f"low={low!r} high={high!r} must be two finite numbers with low < high", remedy="correct them")
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol={protocol!r} is unknown", remedy=f"use one of {', '.join(PROTOCOLS)}")
    if (protocol == "classify") != (model is not None):
        raise UserError(
            f"protocol={protocol!r} with model={model!r}",
            remedy="set model for protocol classify, and remove it for rewards",
        )
    unknown = [name for name in inputs if name not in INPUTS] if isinstance(inputs, Sequence) else [inputs]
    if unknown or isinstance(inputs, str) or not inputs:
        raise UserError(f"inputs={inputs!r} must list names of inputs", remedy=f"use some of {', '.join(INPUTS)}")
    if type(batch_size) is not int or not 1 <= batch_size <= 10_000:
        raise UserError(
            f"batch_size={batch_size!r} must be a whole number from 1 to 10000", remedy="use for example 16"
        )
    check_server(server)


def declared_range(low: float = 0.0, high: float = 1.0, **_: object) -> tuple[float, float]:
    """Return the range (low, high) that the arguments declare."""
    return low, high


def inputs_sent(protocol: str = "rewards", inputs: Sequence[str] = INPUTS, **_: object) -> Sequence[str]:
    """Return the inputs that the requests contain."""
    return inputs if protocol == "rewards" else ("prompt", "completion")


@batched_reward(low=0.0, high=1.0, check_args=check_remote_args, range_of=declared_range, inputs_of=inputs_sent)
@asks_server(concurrency=_CONCURRENCY)
def remote(
    server: RewardServer,
    low: float = 0.0,
    high: float = 1.0,
    protocol: str = "rewards",
    model: str | None = None,
    batch_size: int = 16,
    inputs: Sequence[str] = INPUTS,
) -> BatchScorer:
    """Return the server's values in [low, high]; a value outside of the range is a failed scoring.

    Args:
        server: requests are sent to its `url` unchanged.
        low: least value.
        high: greatest value.
        protocol: `rewards` or `classify`.
        model: for classify, the name of the model on the server.
        batch_size: maximum number of completions per request; a request is sent as soon as there is one completion.
        inputs: keys of the rows of protocol rewards.
    """
    read = _read_classification if protocol == "classify" else _read_rewards

    def score(rows: Sequence[ScoringRow]) -> Sequence[float | Exception]:
        body = _classify_body(rows, model) if protocol == "classify" else _rewards_body(rows, inputs)
        return server.ask("", body, _check_length(read, len(rows)))

    return ThreadedScorer(
        score, batch_size=batch_size, concurrency=server.concurrency, wait_seconds=server.wait_seconds
    )


def _check_length(
    read: Callable[[Any], list[float | Exception]], number: int
) -> Callable[[Any], list[float | Exception]]:
    def checked(answer: Any) -> list[float | Exception]:
        values = read(answer)
        if len(values) != number:
            raise ValueError(f"{len(values)} values for {number} completions")
        return values

    return checked


def _rewards_body(rows: Sequence[ScoringRow], inputs: Sequence[str]) -> dict[str, Any]:
    return {"rows": [{name: _sendable_value(row.input(name)) for name in inputs} for row in rows]}


def _sendable_value(value: Any) -> Any:
    """Return a JSON value whose texts a server accepts."""
    if isinstance(value, str):
        return sendable(value, _MAX_TEXT_CHARACTERS)
    if isinstance(value, Mapping):
        return {sendable(str(key), _MAX_TEXT_CHARACTERS): _sendable_value(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_sendable_value(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_rewards(answer: Any) -> list[float | Exception]:
    return [_to_number(value) for value in answer["rewards"]]


def _classify_body(rows: Sequence[ScoringRow], model: str | None) -> dict[str, Any]:
    return {"model": model, "input": [sendable(row.prompt + row.completion, _MAX_TEXT_CHARACTERS) for row in rows]}


def _read_classification(answer: Any) -> list[float | Exception]:
    ordered = sorted(answer["data"], key=lambda item: item["index"])
    return [_to_number(item["probs"][-1]) for item in ordered]


def _to_number(value: object) -> float | Exception:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ValueError(f"the server returned {value!r}, not a number")
    return float(value)
