"""The row that a reward scores, and the parts of it that a function takes.

A function takes the inputs that its parameters name (`INPUTS`). Its signature is read once, when the terms of the
config are resolved. A function whose first three parameters have other names gets prompt, completion and reference by
position: `def score(question, answer, truth)`.
Asserted by tests/unit/rewards/test_inputs.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

Message = Mapping[str, str]

INPUTS = ("prompt", "completion", "reference", "messages", "completion_with_special_tokens", "fields", "dataset")
"""Names of the parameters of a reward that are filled in from the row. All others come from the term's `args`."""
TEXTS = INPUTS[:3]
_SHOWN_CHARACTERS = 200


class RowContext(TypedDict, total=False):
    """The parts of a `ScoringRow` beside its three texts."""

    messages: Sequence[Message]
    completion_with_special_tokens: str | None
    fields: Mapping[str, Any]
    dataset: str
    index: int | None


@dataclass(frozen=True)
class ScoringRow:
    """One completion with everything that a reward may take.

    Attributes:
        prompt: text of the prompt as the policy got it, after the chat template.
        completion: text of the completion, without special tokens.
        reference: the row's answer.
        messages: the prompt as messages with `role` and `content`, before the chat template, system prompt included.
            Empty: the prompt is one message of the user.
        completion_with_special_tokens: text of the completion with them, such as `<|im_end|>`; None: not known.
        fields: the other columns of the row of data, as JSON values.
        dataset: name of the data set.
        index: position of the row among all rows of the run's data sets; None: not known.
    """

    prompt: str
    completion: str
    reference: str
    messages: Sequence[Message] = ()
    completion_with_special_tokens: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    dataset: str = ""
    index: int | None = None

    def input(self, name: str) -> Any:
        """Return one of `INPUTS`. Unknown messages and special tokens are made from the texts."""
        if name == "messages":
            return [dict(message) for message in self.messages] or [{"role": "user", "content": self.prompt}]
        if name == "completion_with_special_tokens" and self.completion_with_special_tokens is None:
            return self.completion
        return getattr(self, name)

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages with the completion as the answer of the assistant.

        If the last message is the assistant's, which the policy continued, the completion is appended to it.
        """
        *before, last = self.input("messages")
        if last["role"] == "assistant":
            return [*before, last | {"content": last["content"] + self.completion}]
        return [*before, last, {"role": "assistant", "content": self.completion}]

    @property
    def description(self) -> str:
        """The row in one line, for a message: data set, index, and the ends of its texts."""
        place = f"row {self.index}" if self.index is not None else "a row"
        place += f" of data set {self.dataset}" if self.dataset else ""
        texts = (f"{name}={_tail(getattr(self, name))}" for name in TEXTS)
        return f"{place}, {', '.join(texts)}"


def call_inputs(function: Callable[..., Any], args: Mapping[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Return how a reward is called.

    Args:
        function: the reward.
        args: the term's arguments; a parameter with such a name is not an input.

    Returns:
        True if prompt, completion and reference are passed by position; and the names of the other inputs, which are
        passed by keyword.
    """
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    first = positional[: len(TEXTS)]
    by_position = any(p.kind is p.VAR_POSITIONAL for p in parameters) or (
        len(first) == len(TEXTS)
        and not set(first) & set(args)
        and all(name == text or name not in INPUTS for name, text in zip(first, TEXTS, strict=True))
    )
    taken = first if by_position else []
    keywords = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return by_position, tuple(name for name in INPUTS if name in keywords - set(taken) - set(args))


def _tail(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"...{text[-_SHOWN_CHARACTERS:]}")
