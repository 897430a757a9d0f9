r"""Reward `format`: the completion has the shape that was asked for, whatever its answer is worth.

Kinds: `gsm8k` (the last non-empty line is `#### <number>`, and there is no other `####`), `boxed` (exactly one
`\boxed{...}`, closed and not empty), `think_answer` (`<think>...</think><answer>...</answer>` and nothing else),
`regex` (`pattern` is found in the completion).
"""

from __future__ import annotations

import functools
import re

from grpo_mega.rewards.base import reward
from grpo_mega.rewards.numbers import BOXED_START, boxed_contents
from grpo_mega.types import UserError

KINDS = ("gsm8k", "boxed", "think_answer", "regex")

_GSM8K_LINE = re.compile(r"#### [-+\u2212]?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?\Z")
_THINK_ANSWER_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def check_format_args(kind: str | None = None, pattern: str | None = None) -> None:
    """Refuse argument values that `answer_format` cannot work with.

    Raises:
        UserError: an unknown kind, a pattern missing, superfluous or malformed.
    """
    if kind is not None and kind not in KINDS:
        raise UserError(f"kind={kind!r} is unknown; use one of {', '.join(KINDS)}")
    if pattern is None:
        if kind == "regex":
            raise UserError("kind='regex' has no pattern; add pattern: <regular expression>")
        return
    if kind not in (None, "regex"):
        raise UserError(f"pattern={pattern!r} would do nothing with kind={kind!r}; leave one of them out")
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UserError(f"pattern={pattern!r} is no regular expression ({error}); correct it") from error


@reward(low=0.0, high=1.0, check_args=check_format_args)
def answer_format(
    prompt: str, completion: str, reference: str, kind: str | None = None, pattern: str | None = None
) -> float:
    """1 when the completion has the asked shape, else 0.

    Args:
        prompt: not looked at.
        completion: judged.
        reference: not looked at.
        kind: `gsm8k`, `boxed`, `think_answer` or `regex`; unset: `regex` with a pattern, `gsm8k` without.
        pattern: searched for anywhere in the completion; `^ $ .` as in Python's re (`(?s)`, `(?m)` work).
    """
    if pattern is not None:
        return float(_compiled(pattern).search(completion) is not None)
    if kind == "boxed":
        contents = boxed_contents(completion)
        return float(completion.count(BOXED_START) == 1 and contents is not None and contents.strip() != "")
    if kind == "think_answer":
        return float(_is_think_answer(completion))
    lines = completion.rstrip().rsplit("\n", 1)
    return float(completion.count("####") == 1 and _GSM8K_LINE.match(lines[-1].strip()) is not None)


@functools.lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _is_think_answer(completion: str) -> bool:
    text = completion.strip()
    if any(text.count(tag) != 1 for tag in _THINK_ANSWER_TAGS):
        return False
    think, _, rest = text.partition("</think>")
    answer = rest.strip()
    return (
        think.startswith("<think>")
        and think != "<think>"
        and answer.startswith("<answer>")
        and answer.endswith("</answer>")
        and answer.removeprefix("<answer>").removesuffix("</answer>").strip() != ""
    )
