"""Reward `judge`: another model's mark for the completion, from any server that speaks OpenAI's chat completions.

The mark is the last match of `pattern` in what the judge writes. An answer without a mark on the scale is asked for
again; after that the scoring has failed. A completion can try to talk its judge round: what it earns is only as good
as the judge.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from grpo_mega.rewards.base import batched_reward
from grpo_mega.rewards.batched import BatchScorer, ScoringRow, ThreadedScorer
from grpo_mega.rewards.http_client import RewardServer, ServerError, asks_server, check_server, sendable
from grpo_mega.types import UserError

TEMPLATE = """You grade an answer to a question.

[Question]
{prompt}

[Reference]
{reference}

[Answer]
{completion}

[End of the answer]
Is the answer correct, complete and clear? Explain in two sentences, then write a last line `Score: N` where N is a \
whole number from 1 (useless) to 10 (perfect)."""
PATTERN = r"Score:\s*\**\s*(-?[0-9]+(?:\.[0-9]+)?)"

_PLACES = re.compile(r"\{(prompt|completion|reference)\}")
_LONGEST_TEXT = 50_000
_CONCURRENCY = 8


@asks_server(concurrency=_CONCURRENCY)
def check_judge_args(
    server: RewardServer,
    model: str,
    template: str = TEMPLATE,
    pattern: str = PATTERN,
    scale: Sequence[float] = (1, 10),
    max_tokens: int = 512,
) -> None:
    """Refuse values that `judge` cannot work with, and a server that is not there.

    Raises:
        UserError: names the argument.
    """
    if not isinstance(model, str) or not model:
        raise UserError(f"model={model!r} is no name", remedy="give the name under which the server knows its model")
    if not isinstance(template, str) or "{completion}" not in template:
        raise UserError(
            "template does not contain {completion}, so all answers would get the same mark", remedy="add it"
        )
    try:
        groups = re.compile(pattern).groups
    except (re.error, TypeError) as error:
        raise UserError(f"pattern={pattern!r} is no regular expression ({error})", remedy="correct it") from error
    if groups < 1:
        raise UserError(f"pattern={pattern!r} has no group", remedy="put brackets around the number")
    numbers = isinstance(scale, Sequence) and all(type(end) in (int, float) for end in scale)
    if not numbers or len(scale) != 2 or not -1e9 <= scale[0] < scale[1] <= 1e9:
        raise UserError(f"scale={scale!r} is no [lowest, highest]", remedy="use for example [1, 10]")
    if type(max_tokens) is not int or max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens!r} is no whole number above 0", remedy="use for example 512")
    check_server(server)


@batched_reward(low=0.0, high=1.0, check_args=check_judge_args)
@asks_server(concurrency=_CONCURRENCY)
def judge(
    server: RewardServer,
    model: str,
    template: str = TEMPLATE,
    pattern: str = PATTERN,
    scale: Sequence[float] = (1, 10),
    max_tokens: int = 512,
) -> BatchScorer:
    """(mark - scale[0]) / (scale[1] - scale[0]), in [0, 1].

    Args:
        server: its `url` is that of the API, for example http://localhost:8000/v1; requests go to its
            `/chat/completions`.
        model: the name of the judge on that server.
        template: what the judge is asked; `{prompt}`, `{reference}` and `{completion}` are filled in.
        pattern: its first group is the mark.
        scale: lowest and highest mark.
        max_tokens: of the judge's answer; it is sampled at temperature 0.
    """
    server = replace(server, url=server.url.rstrip("/"))
    compiled, (lowest, highest) = re.compile(pattern), scale

    def mark_in(answer: Any) -> float:
        said = str(answer["choices"][0]["message"]["content"])
        marks = [match[1] for match in compiled.finditer(said[-_LONGEST_TEXT:])]
        if not marks:
            raise ValueError(f"no mark in {said[-100:]!r}")
        mark = float(marks[-1])
        if not lowest <= mark <= highest:
            raise ValueError(f"mark {mark:g} is not on the scale {lowest:g} to {highest:g}")
        return (mark - lowest) / (highest - lowest)

    def score(rows: Sequence[ScoringRow]) -> list[float | Exception]:
        (row,) = rows
        texts = {name: sendable(getattr(row, name), _LONGEST_TEXT) for name in ("prompt", "completion", "reference")}
        question = _PLACES.sub(lambda place: texts[place[1]], template)
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0.0,
            "max_tokens": max_tokens,
        }
        try:
            return [server.ask("/chat/completions", body, mark_in)]
        except ServerError as error:
            return [error]

    return ThreadedScorer(score, batch_size=1, concurrency=server.concurrency, wait_seconds=server.wait_seconds)
