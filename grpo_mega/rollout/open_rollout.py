"""A rollout that is not complete yet: its answers and replies so far, and what ends it.

Asserted by tests/unit/rollout/test_open_rollout.py and tests/unit/rollout/test_multi_turn.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grpo_mega.data.rollout_tokens import NOT_SAMPLED
from grpo_mega.environments.base import Turn
from grpo_mega.environments.pool import Reply
from grpo_mega.types import Completion, Prompt, StopReason

TextOf = Callable[[Sequence[int]], str]
"""Function that returns the text of tokens, as of an answer."""


class Codec(Protocol):
    """Tokenizer of replies (data/chat.py)."""

    def encode(self, result: str) -> tuple[int, ...]:
        """Return the tokens of a reply.

        Raises:
            ValueError: the reply cannot be tokenized.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the tokens."""
        ...

    def cut_at_stop(self, token_ids: Sequence[int], stop: Sequence[str]) -> tuple[str, str] | None:
        """Return the text up to and including the stop text that the last token completes, and that stop text."""
        ...


class RolloutPart(NamedTuple):
    """Tokens [N] int32 of an answer, of a part of it, or of a reply, and their log-probs [N] float32.

    `policy_version` is that of the weights which sampled them; NOT_SAMPLED for a reply.
    """

    token_ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    policy_version: int


@dataclass
class OpenRollout:
    """A rollout in progress. `parts` before `answer_start` belong to complete answers and replies."""

    prompt: Prompt
    parts: list[RolloutPart] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    answer_start: int = 0
    stop_reason: StopReason = "length"
    failure: str | None = None
    expert_choices: Tensor | None = None
    is_done: bool = False

    def copy(self) -> OpenRollout:
        """Return a rollout that can be continued without a change of this one."""
        return replace(self, parts=list(self.parts), turns=list(self.turns))

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all answers and replies."""
        return sum(len(part.token_ids) for part in self.parts)

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Tokens of all answers and replies, [N] int32."""
        return np.concatenate([np.zeros(0, np.int32), *(part.token_ids for part in self.parts)])

    @property
    def answer_ids(self) -> list[int]:
        """Tokens of the answer that is not complete yet."""
        return [token for part in self.parts[self.answer_start :] for token in part.token_ids.tolist()]

    @property
    def oldest_version(self) -> int | None:
        """Version of the oldest weights that sampled one of its tokens; None without sampled tokens."""
        return min((p.policy_version for p in self.parts if p.policy_version != NOT_SAMPLED), default=None)

    def next_prompt(self) -> Prompt:
        """Return what the engine continues: the prompt with all tokens so far."""
        if not self.parts:
            return self.prompt
        return replace(self.prompt, token_ids=(*self.prompt.token_ids, *self.token_ids.tolist()))

    def add_sampled(self, completion: Completion) -> None:
        """Append tokens that continue the answer.

        The engine's routing record covers the sequence from the prompt on. Tokens that have a record keep it: it is
        that of the weights which sampled the token after them.
        """
        self.parts.append(RolloutPart(completion.token_ids, completion.sampler_log_probs, completion.policy_version))
        self.stop_reason, record, known = completion.stop_reason, completion.expert_choices, self.expert_choices
        if record is not None:
            record = record[: len(self.prompt.token_ids) + self.num_tokens]
        if record is not None and known is not None:
            record = torch.cat([known, record[len(known) :].to(known.dtype)])
        self.expert_choices = known if record is None else record

    def end_answer(self, turn: Turn) -> None:
        """Note that the answer is complete; the environment gets it as `turn`."""
        self.turns.append(turn)
        self.answer_start = len(self.parts)

    def add_reply(self, result: str, token_ids: Sequence[int]) -> None:
        """Append a reply of the environment."""
        count = len(token_ids)
        self.parts.append(RolloutPart(np.asarray(token_ids, np.int32), np.zeros(count, np.float32), NOT_SAMPLED))
        self.turns[-1] = replace(self.turns[-1], result=result)
        self.answer_start = len(self.parts)

    def apply_reply(self, reply: Reply, codec: Codec, max_tokens: int) -> bool:
        """Apply the reply to the last answer; return True if another answer follows, else the rollout is complete.

        Args:
            reply: of the environment.
            codec: tokenizes it.
            max_tokens: limit for all answers and replies. A reply that leaves no token for an answer is omitted.
        """
        result, self.failure = reply.result, reply.failure
        if self.failure is None and result is not None:
            try:
                token_ids = codec.encode(result)
            except ValueError as error:
                self.failure = str(error)
            else:
                if self.num_tokens + len(token_ids) < max_tokens:
                    self.add_reply(result, token_ids)
                    return True
                self.stop_reason = "length"
        self.is_done = True
        return False

    def completion(self, text_of: TextOf) -> Completion:
        """Return the whole rollout as one completion."""
        lengths = [len(part.token_ids) for part in self.parts]
        versions = np.repeat(np.array([part.policy_version for part in self.parts], np.int32), lengths)
        sampled = versions != NOT_SAMPLED
        token_ids, last = self.token_ids, int(versions[sampled][-1])
        return Completion(
            token_ids=token_ids,
            sampler_log_probs=np.concatenate([part.log_probs for part in self.parts]),
            stop_reason=self.stop_reason,
            policy_version=last,
            text=text_of(token_ids.tolist()),
            expert_choices=self.expert_choices,
            loss_mask=None if sampled.all() else sampled,
            num_turns=max(1, len(self.turns)),
            failure=self.failure,
            policy_versions=None if (versions[sampled] == last).all() else versions,
        )


def turn_of(answer: str, token_ids: Sequence[int], stop_reason: StopReason, codec: Codec, stop: Sequence[str]) -> Turn:
    """Return an answer as the environment gets it: without characters of the last token after the stop text.

    Args:
        answer: its text.
        token_ids: its tokens.
        stop_reason: `stop` if a stop text ended it.
        codec: finds the stop text.
        stop: texts that end an answer.
    """
    cut = codec.cut_at_stop(token_ids, stop) if stop_reason == "stop" else None
    return Turn(answer) if cut is None else Turn(cut[0], stop_text=cut[1])


def cut_at_seam(before: Sequence[int], completion: Completion, codec: Codec, stop: Sequence[str]) -> Completion:
    """Return the continuation of an answer, cut behind the token that completes a stop text which began before it.

    An engine looks for stop texts in the tokens of one call only.

    Args:
        before: earlier tokens of the answer.
        completion: tokens that continue it.
        codec: decodes tokens.
        stop: texts that end an answer.
    """
    longest = max(map(len, stop), default=0)
    tail = list(before[-(4 * longest + 8) :])  # a character has at most 4 bytes, and a token at least one
    if not tail or longest < 2:
        return completion
    tokens = completion.token_ids.tolist()
    for count in range(1, len(tokens) + 1):
        if codec.cut_at_stop(tail + tokens[:count], stop) is not None:
            return replace(
                completion,
                token_ids=completion.token_ids[:count],
                sampler_log_probs=completion.sampler_log_probs[:count],
                stop_reason="stop",
            )
        if len(codec.decode(tokens[:count])) >= longest:
            break
    return completion
