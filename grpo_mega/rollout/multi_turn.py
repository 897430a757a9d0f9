"""Rollouts with several turns on one engine replica: the policy answers, the environment replies, and so on.

All ranks of a prompt shard make the same calls. All unfinished rollouts of a wave take a turn together. When every
answer is complete, the first rank collects the replies and broadcasts them, and all ranks apply them in the same order.
Nothing that only one rank knows, such as the arrival time of a reply, reaches the engine. The data-parallel ranks of a
replica call their engine for the same number of turns, also without unfinished rollouts. Sampled tokens are never
changed: a reply is tokenized alone and appended, and the next prompt is the sequence of tokens so far.
Asserted by tests/unit/rollout/test_multi_turn.py and tests/e2e/test_calculator.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from grpo_mega.environments.base import Turn
from grpo_mega.environments.pool import Reply
from grpo_mega.interfaces import Engine
from grpo_mega.rollout.open_rollout import Codec, OpenRollout, turn_of
from grpo_mega.rollout.sampler import derived_seed
from grpo_mega.types import Completion, Prompt, SamplingRequest

OnCompletion = Callable[[int, int, Completion], None]


class Environments(Protocol):
    """Interface of the environment workers (environments/pool.py)."""

    def submit(self, key: int, prompt: str, turns: Sequence[Turn], reference: str) -> None:
        """Start computing a reply; returns at once.

        Args:
            key: number of the rollout, with which `collect` returns the reply.
            prompt: text after the chat template.
            turns: answers and replies so far; the last turn has no reply yet.
            reference: the data set's answer to the prompt.
        """
        ...

    def collect(self) -> dict[int, Reply]:
        """Wait for and return the replies to everything submitted since the last call."""
        ...


class Broadcast(Protocol):
    """Broadcast from the first rank of a prompt shard; other ranks pass None and receive the value."""

    def __call__(self, value: Any) -> Any: ...


@dataclass(frozen=True)
class MultiTurnGenerator:
    """Sampler of whole rollouts from an engine and an environment.

    Attributes:
        engine: engine of this rank.
        environments: environment workers; None on all ranks of the prompt shard but the first.
        codec: tokenizes replies.
        stop: texts that end an answer.
        max_turns: largest number of answers of a rollout.
        broadcast: broadcasts within the prompt shard.
        any_unfinished: returns True if its argument is True on any rank of the replica.
    """

    engine: Engine
    environments: Environments | None
    codec: Codec
    stop: tuple[str, ...]
    max_turns: int
    broadcast: Broadcast
    any_unfinished: Callable[[bool], bool] = bool

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingRequest, on_completion: OnCompletion | None = None
    ) -> list[list[Completion]]:
        """Sample whole rollouts; the contract is `Engine.generate`.

        `sampling.max_tokens` limits the tokens of all answers and replies together. A rollout ends when the environment
        returns no reply, after `max_turns` answers, or when a reply leaves no token for an answer. In the last case the
        reply is omitted and the rollout counts as truncated.
        """
        wave = _Wave(self, prompts, sampling, on_completion)
        for turn in range(self.max_turns):
            if not self.any_unfinished(wave.take(turn)):
                break
        return wave.completions()

    def replies(self) -> dict[int, Reply]:
        """Return the replies that the first rank of the prompt shard collected, by key. Collective.

        Raises:
            Exception: the exception of `collect` on the first rank, whatever its type, on every rank of the shard.
        """
        outcome: dict[int, Reply] | Exception | None = None
        if self.environments is not None:
            try:
                outcome = self.environments.collect()
            except Exception as error:  # raised below on every rank
                outcome = error
        received = self.broadcast(outcome)
        if isinstance(received, Exception):
            raise received
        replies: dict[int, Reply] = received
        return replies

    @contextmanager
    def discarding_replies(self) -> Iterator[None]:
        """Discard the replies to answers of a call of the engine that fails: the next call has other answers."""
        try:
            yield
        except Exception:
            if self.environments is not None:
                with suppress(RuntimeError):  # the failure of the engine is raised
                    self.environments.collect()
            raise


class _Wave:
    """Rollouts of one call. The unfinished ones keep the order of their prompts."""

    def __init__(
        self,
        owner: MultiTurnGenerator,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        report: OnCompletion | None,
    ) -> None:
        self._owner, self._prompts, self._sampling, self._report = owner, prompts, sampling, report
        self._size = sampling.group_size
        self._unfinished = [(i, OpenRollout(prompts[i // self._size])) for i in range(len(prompts) * self._size)]
        self._requested: set[int] = set()
        self._done: dict[int, Completion] = {}

    def take(self, turn: int) -> bool:
        """Sample one answer per unfinished rollout and apply the replies; return True if any remains unfinished."""
        self._requested = set()
        request = replace(self._sampling, stop=self._owner.stop)
        if turn == 0:
            prompts = self._prompts
        else:
            prompts = [rollout.next_prompt() for _, rollout in self._unfinished]
            limits = tuple(self._sampling.max_tokens - rollout.num_tokens for _, rollout in self._unfinished)
            seed = derived_seed(self._sampling.seed, turn)
            request = replace(request, group_size=1, seed=seed, max_tokens_each=limits, continues=True)
        is_last = turn == self._owner.max_turns - 1

        def on_completion(position: int, member: int, completion: Completion) -> None:
            self._add_completion(position * request.group_size + member, completion, is_last)

        with self._owner.discarding_replies():
            self._owner.engine.generate(prompts, request, on_completion)
        replies = self._owner.replies() if self._requested else {}
        assert replies.keys() == self._requested, f"requested {sorted(self._requested)}, received {sorted(replies)}"
        # in the order of the prompts, independent of the order of the replies
        self._unfinished = [
            self._unfinished[i] for i in sorted(self._requested) if self._apply_reply(*self._unfinished[i], replies[i])
        ]
        return bool(self._unfinished)

    def completions(self) -> list[list[Completion]]:
        """Return all completions: one list per prompt."""
        return [
            [self._done[i * self._size + member] for member in range(self._size)] for i in range(len(self._prompts))
        ]

    def _add_completion(self, place: int, completion: Completion, is_last: bool) -> None:
        owner, (key, rollout) = self._owner, self._unfinished[place]
        rollout.add_sampled(completion)
        answer, reason = rollout.answer_ids, completion.stop_reason
        rollout.end_answer(turn_of(completion.text, answer, reason, owner.codec, owner.stop))
        if is_last or reason == "length":
            self._finish(key, rollout)
            return
        self._requested.add(place)
        if owner.environments is not None:
            prompt = rollout.prompt
            owner.environments.submit(place, prompt.text, rollout.turns, prompt.answer)

    def _apply_reply(self, key: int, rollout: OpenRollout, reply: Reply) -> bool:
        """Apply a reply; return True if another answer follows."""
        if rollout.apply_reply(reply, self._owner.codec, self._sampling.max_tokens):
            return True
        self._finish(key, rollout)
        return False

    def _finish(self, key: int, rollout: OpenRollout) -> None:
        completion = rollout.completion(self._owner.codec.decode)
        self._done[key] = completion
        if self._report is not None:
            position, member = divmod(key, self._size)
            self._report(position, member, completion)


def broadcast_within(group: dist.ProcessGroup | None, first_rank: int) -> Broadcast:
    """Return a broadcast over the ranks of a prompt shard; None: the shard has one rank."""

    def broadcast(value: Any) -> Any:
        if group is None:
            return value
        objects = [value]
        dist.broadcast_object_list(objects, src=first_rank, group=group)
        return objects[0]

    return broadcast


def any_rank_within(group: dist.ProcessGroup | None) -> Callable[[bool], bool]:
    """Return a function that is True if its argument is True on any rank of the group; None: this rank only."""

    def any_of(here: bool) -> bool:
        if group is None:
            return here
        result = torch.tensor([int(here)])
        dist.all_reduce(result, dist.ReduceOp.MAX, group=group)
        return bool(result.item())

    return any_of
