"""Reward `judge`: the mark that another model gives the completion, from any server with OpenAI's chat completions API.

The judge reads the conversation as messages, without the markup of the policy's chat template. The mark is the last
match of `pattern` in the judge's answer. An answer without a mark on the scale is requested again; after the last retry
the scoring has failed. A completion may try to persuade the judge, so the reward is only as reliable as the judge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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

_PLACEHOLDERS = re.compile(r"\{(prompt|completion|reference|dataset|fields\.[^{}\s]+)\}")
_MAX_TEXT_CHARACTERS = 50_000
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
    """Check the arguments of `judge`, and that its server accepts connections.

    Raises:
        UserError: names the argument.
    """
    if not isinstance(model, str) or not model:
        raise UserError(f"model={model!r} must be the name of a model on the server", remedy="see the server's /models")
    if not isinstance(template, str) or "{completion}" not in template:
        raise UserError("template must contain {completion}, else all answers get the same mark", remedy="add it")
    try:
        groups = re.compile(pattern).groups
    except (re.error, TypeError) as error:
        raise UserError(f"pattern={pattern!r} is not a regular expression ({error})", remedy="correct it") from error
    if groups < 1:
        raise UserError(f"pattern={pattern!r} must have a group", remedy="put brackets around the number")
    numbers = isinstance(scale, Sequence) and all(type(end) in (int, float) for end in scale)
    if not numbers or len(scale) != 2 or not -1e9 <= scale[0] < scale[1] <= 1e9:
        raise UserError(f"scale={scale!r} must be [lowest, highest]", remedy="use for example [1, 10]")
    if type(max_tokens) is not int or max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens!r} must be a whole number above 0", remedy="use for example 512")
    check_server(server)


def inputs_of_template(template: str = TEMPLATE, **_: object) -> list[str]:
    """Return the inputs that a template reads."""
    names = ["messages", "completion", "reference"]
    return [*names, "fields"] if "{fields." in template else names


@batched_reward(low=0.0, high=1.0, check_args=check_judge_args, inputs_of=inputs_of_template)
@asks_server(concurrency=_CONCURRENCY)
def judge(
    server: RewardServer,
    model: str,
    template: str = TEMPLATE,
    pattern: str = PATTERN,
    scale: Sequence[float] = (1, 10),
    max_tokens: int = 512,
) -> BatchScorer:
    """Return (mark - scale[0]) / (scale[1] - scale[0]), in [0, 1].

    Args:
        server: its `url` is the base URL of the API, for example http://localhost:8000/v1; requests are sent to
            `/chat/completions` below it.
        model: the name of the judge on that server.
        template: the question to the judge. `{prompt}`, `{completion}`, `{reference}`, `{dataset}` and `{fields.NAME}`
            (a column of the row) are filled in.
        pattern: regular expression whose first group is the mark.
        scale: lowest and highest mark.
        max_tokens: limit of the judge's answer, which is sampled at temperature 0.
    """
    server = replace(server, url=server.url.rstrip("/"))
    compiled, (lowest, highest) = re.compile(pattern), scale

    def mark_in(answer: Any) -> float:
        content = str(answer["choices"][0]["message"]["content"])
        marks = [match[1] for match in compiled.finditer(content[-_MAX_TEXT_CHARACTERS:])]
        if not marks:
            raise ValueError(f"no mark in {content[-100:]!r}")
        mark = float(marks[-1])
        if not lowest <= mark <= highest:
            raise ValueError(f"mark {mark:g} is not on the scale {lowest:g} to {highest:g}")
        return (mark - lowest) / (highest - lowest)

    def score(rows: Sequence[ScoringRow]) -> list[float | Exception]:
        (row,) = rows
        *question, answer = row.conversation
        texts = {
            "prompt": text_of_messages(question),
            "completion": answer["content"],
            "reference": row.reference,
            "dataset": row.dataset,
        }
        texts |= {f"fields.{name}": _text_of_field(value) for name, value in row.fields.items()}
        try:
            content = _PLACEHOLDERS.sub(lambda match: sendable(texts[match[1]], _MAX_TEXT_CHARACTERS), template)
        except KeyError as error:
            return [ValueError(f"template has {{{error.args[0]}}}; the columns of the row are {sorted(row.fields)}")]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "max_tokens": max_tokens,
        }
        try:
            return [server.ask("/chat/completions", body, mark_in)]
        except ServerError as error:
            return [error]

    return ThreadedScorer(score, batch_size=1, concurrency=server.concurrency, wait_seconds=server.wait_seconds)


def text_of_messages(messages: Sequence[Mapping[str, str]]) -> str:
    """Return messages as text for a reader: the content of a single one, else each after its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _text_of_field(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
