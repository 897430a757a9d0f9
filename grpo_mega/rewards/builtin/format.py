r"""Reward `format`: the completion has the requested format, whether or not its answer is right.

Kinds: `gsm8k` (the last non-empty line is `#### <number>`, and there is no other `####`), `boxed` (exactly one
`\boxed{...}`, closed and not empty), `think_answer` (`<think>...</think><answer>...</answer>` and nothing else),
`think` (`<think>...</think>`, then an answer without tags of a thought), `tags` (the named tags in their order, and
nothing around them), `regex` (`pattern` is found in the completion).

`gsm8k` and `boxed` judge the answer, without its thought. The kinds with tags judge the completion as the prompt began
it: if the prompt ends with one of the tags, opened, then the completion is read as if it began with that tag.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence

from grpo_mega.rewards.base import reward
from grpo_mega.rewards.final_answers.answer_boxes import find_boxes
from grpo_mega.rewards.thought import THOUGHT_TAG, answer_part, with_opened_tag
from grpo_mega.types import UserError

KINDS = ("gsm8k", "boxed", "think_answer", "think", "tags", "regex")

_GSM8K_LINE = re.compile(r"#### [-+\u2212]?\$?(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?\Z")
_BOXED = re.compile(r"\\boxed\s*\{")
_TAG_NAME = re.compile(r"[A-Za-z][\w-]{0,63}")


def check_format_args(kind: str | None = None, pattern: str | None = None, tags: Sequence[str] | None = None) -> None:
    """Check the arguments of `answer_format`.

    Raises:
        UserError: the kind is unknown; pattern or tags are missing, not used by the kind, or malformed.
    """
    if kind is not None and kind not in KINDS:
        raise UserError(f"kind={kind!r} is unknown", remedy=f"use one of {', '.join(KINDS)}")
    if (kind == "tags") != (tags is not None):
        raise UserError(
            f"kind={kind!r} with tags={tags!r}", remedy="give both kind: tags and tags: [think, answer], or neither"
        )
    if tags is not None and (isinstance(tags, str) or not tags or not all(_is_tag_name(tag) for tag in tags)):
        raise UserError(f"tags={tags!r} must be a list of names", remedy="use for example [think, answer]")
    if tags is not None and len(set(tags)) < len(tags):
        raise UserError(f"tags={tags!r} names a tag twice", remedy="name each tag once")
    if pattern is None:
        if kind == "regex":
            raise UserError("kind='regex' needs a pattern", remedy="add pattern: <regular expression>")
        return
    if kind not in (None, "regex"):
        raise UserError(f"pattern={pattern!r} has no effect with kind={kind!r}", remedy="remove one of them")
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UserError(f"pattern={pattern!r} is not a regular expression ({error})", remedy="correct it") from error


@reward(low=0.0, high=1.0, check_args=check_format_args)
def answer_format(
    prompt: str,
    completion: str,
    reference: str,
    kind: str | None = None,
    pattern: str | None = None,
    tags: Sequence[str] | None = None,
) -> float:
    """Return 1 when the completion has the requested format, else 0.

    Args:
        prompt: only the tag that its end opens matters.
        completion: its format is checked.
        reference: not used.
        kind: `gsm8k`, `boxed`, `think_answer`, `think`, `tags` or `regex`; default: `regex` if there is a pattern, else
            `gsm8k`.
        pattern: regular expression that is searched anywhere in the completion, with the rules of Python's re module.
        tags: names for kind `tags`: `<a>...</a><b>...</b>`, each once, not empty, with only white space between them.
    """
    if pattern is not None:
        return float(_compile(pattern).search(completion) is not None)
    if kind == "boxed":
        answer = answer_part(prompt, completion)
        boxes = find_boxes(answer)
        is_only = len(boxes) == len(_BOXED.findall(answer)) == 1
        return float(is_only and boxes[0].content is not None and _is_visible(boxes[0].content))
    if kind == "think_answer" or tags is not None:
        names = tags or ("think", "answer")
        return float(_is_tagged(with_opened_tag(prompt, completion, names), names))
    if kind == "think":
        thought, end, answer = with_opened_tag(prompt, completion, ("think",)).partition("</think>")
        has_more = THOUGHT_TAG.search(answer) is not None
        return float(_is_tagged(thought + end, ("think",)) and _is_visible(answer) and not has_more)
    answer = answer_part(prompt, completion)
    lines = answer.rstrip().rsplit("\n", 1)
    return float(answer.count("####") == 1 and _GSM8K_LINE.match(lines[-1].strip()) is not None)


@functools.lru_cache(maxsize=64)
def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _is_visible(text: str) -> bool:
    """Return True if the text has a character that is neither white space nor invisible (category C or Z)."""
    return any(unicodedata.category(character)[0] not in "CZ" for character in text)


def _is_tag_name(tag: object) -> bool:
    return isinstance(tag, str) and _TAG_NAME.fullmatch(tag) is not None


def _is_tagged(completion: str, tags: Sequence[str]) -> bool:
    """Return True when the text is these elements in order, none empty, with only white space around them."""
    rest = completion.strip()
    if any(rest.count(mark) != 1 for tag in tags for mark in (f"<{tag}>", f"</{tag}>")):
        return False
    for tag in tags:
        if not rest.startswith(f"<{tag}>"):
            return False
        content, _, rest = rest.removeprefix(f"<{tag}>").partition(f"</{tag}>")
        if not _is_visible(content) or any(f"<{other}>" in content for other in tags):
            return False
        rest = rest.lstrip()
    return rest == ""
