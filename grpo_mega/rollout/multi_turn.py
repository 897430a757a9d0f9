"""Rollouts of several turns on one engine replica: the policy answers, the environment replies, the policy goes on.

All ranks of a share of the prompts make the same calls. The turns of a wave are taken together: when every open answer
is complete, the first rank has the replies, they are broadcast, and all ranks apply them in the same order; nothing
that only one rank knows (when a reply came, how long it took) reaches the engine. The data-parallel ranks of a replica
step together: one with nothing left to ask calls its engine for as many turns as the others. What was sampled stays as
it is: a reply is tokenised alone and appended, and the next prompt is the sequence of tokens so far.
Asserted by tests/unit/rollout/test_multi_turn.py and tests/e2e/test_calculator.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from grpo_mega.environments.base import Turn
from grpo_mega.environments.pool import Reply
from grpo_mega.interfaces import Engine
from grpo_mega.rollout.sampler import derived_seed
from grpo_mega.types import Completion, Prompt, SamplingRequest, StopReason

OnCompletion = Callable[[int, int, Completion], None]


class Environments(Protocol):
    """Environment processes (environments/pool.py)."""

    def submit(self, key: int, prompt: str, turns: Sequence[Turn], reference: str) -> None:
        """Start one; returns at once."""
        ...

    def collect(self) -> dict[int, Reply]:
        """The replies to everything submitted since the last call."""
        ...


class Codec(Protocol):
    """Tokens of a reply (data/chat.py)."""

    def encode(self, result: str) -> tuple[int, ...]:
        """Raises ValueError for what cannot be written."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class Broadcast(Protocol):
    """Broadcast from the first rank of a share to the others; it passes what it is given there, the others None."""

    def __call__(self, value: Any) -> Any: ...


@dataclass
class _Rollout:
    """One rollout on its way."""

    prompt: Prompt
    position: int
    member: int
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    stop_reason: StopReason = "length"
    policy_version: int = 0
    failure: str | None = None
    expert_choices: Any = None

    def answered(self, completion: Completion) -> None:
        self.token_ids += completion.token_ids
        self.log_probs += completion.sampler_log_probs
        self.mask += [True] * len(completion.token_ids)
        self.turns.append(Turn(completion.text))
        self.stop_reason, self.policy_version = completion.stop_reason, completion.policy_version
        self.expert_choices = completion.expert_choices  # of the whole sequence: this answer's prompt is all before it

    def replied(self, result: str, token_ids: Sequence[int]) -> None:
        self.token_ids += token_ids
        self.log_probs += [0.0] * len(token_ids)
        self.mask += [False] * len(token_ids)
        self.turns[-1] = replace(self.turns[-1], result=result)

    def next_prompt(self) -> Prompt:
        return replace(self.prompt, token_ids=(*self.prompt.token_ids, *self.token_ids))

    def completion(self, codec: Codec) -> Completion:
        return Completion(
            token_ids=tuple(self.token_ids),
            sampler_log_probs=tuple(self.log_probs),
            stop_reason=self.stop_reason,
            policy_version=self.policy_version,
            text=codec.decode(self.token_ids),
            expert_choices=self.expert_choices,
            loss_mask=None if all(self.mask) else tuple(self.mask),
            num_turns=len(self.turns),
            failure=self.failure,
        )


@dataclass(frozen=True)
class MultiTurnGenerator:
    """An engine and an environment as one sampler of whole rollouts.

    `environments` is None but on the first rank of the share; `codec` tokenises replies; `stop` are texts that end an
    answer; `max_turns` is the most answers of a rollout; `share` broadcasts within the share; `any_unfinished` says
    whether a rollout goes on anywhere in the replica.
    """

    engine: Engine
    environments: Environments | None
    codec: Codec
    stop: tuple[str, ...]
    max_turns: int
    share: Broadcast
    any_unfinished: Callable[[bool], bool] = bool

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingRequest, on_completion: OnCompletion | None = None
    ) -> list[list[Completion]]:
        """As `Engine.generate`, with whole rollouts: `sampling.max_tokens` counts tokens of all answers and replies.

        A rollout ends where the environment has nothing to say, after `max_turns` answers, and where a reply leaves no
        token for an answer (it is then left out, and the rollout counts as truncated).
        """
        wave = _Wave(self, prompts, sampling, on_completion)
        for turn in range(self.max_turns):
            if not self.any_unfinished(wave.take(turn)):
                break
        return wave.completions()

    def replies(self) -> dict[int, Reply]:
        """Of the first rank, on every rank of the share; what fails there fails on all."""
        outcome: dict[int, Reply] | Exception | None = None
        if self.environments is not None:
            try:
                outcome = self.environments.collect()
            except Exception as error:  # raised below, on every rank
                outcome = error
        heard = self.share(outcome)
        if isinstance(heard, Exception):
            raise heard
        replies: dict[int, Reply] = heard
        return replies


class _Wave:
    """The rollouts of one call; those that are open keep the order of their prompts."""

    def __init__(
        self,
        owner: MultiTurnGenerator,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        report: OnCompletion | None,
    ) -> None:
        self._owner, self._prompts, self._sampling, self._report = owner, prompts, sampling, report
        self._size = sampling.group_size
        self._open = [_Rollout(p, i, member) for i, p in enumerate(prompts) for member in range(self._size)]
        self._asked: set[int] = set()
        self._done: dict[int, Completion] = {}

    def take(self, turn: int) -> bool:
        """One answer to each open rollout, and the replies; whether any rollout goes on."""
        self._asked = set()
        request = replace(self._sampling, stop=self._owner.stop)
        if turn == 0:
            prompts = self._prompts
        else:
            prompts = [rollout.next_prompt() for rollout in self._open]
            limits = tuple(self._sampling.max_tokens - len(rollout.token_ids) for rollout in self._open)
            seed = derived_seed(self._sampling.seed, turn)
            request = replace(request, group_size=1, seed=seed, max_tokens_each=limits, continues=True)
        is_last = turn == self._owner.max_turns - 1

        def heard(position: int, member: int, completion: Completion) -> None:
            self._hear(position * request.group_size + member, completion, is_last)

        self._owner.engine.generate(prompts, request, heard)
        replies = self._owner.replies() if self._asked else {}
        assert replies.keys() == self._asked, f"asked {sorted(self._asked)}, heard {sorted(replies)}"
        # in the order of the prompts, whichever reply came first
        self._open = [self._open[i] for i in sorted(self._asked) if self._goes_on(self._open[i], replies[i])]
        return bool(self._open)

    def completions(self) -> list[list[Completion]]:
        """All of them, by prompt."""
        return [
            [self._done[i * self._size + member] for member in range(self._size)] for i in range(len(self._prompts))
        ]

    def _hear(self, place: int, completion: Completion, is_last: bool) -> None:
        rollout = self._open[place]
        rollout.answered(completion)
        if is_last or completion.stop_reason == "length":
            self._finish(rollout)
            return
        self._asked.add(place)
        if self._owner.environments is not None:
            prompt = rollout.prompt
            self._owner.environments.submit(place, prompt.text, rollout.turns, prompt.answer)

    def _goes_on(self, rollout: _Rollout, reply: Reply) -> bool:
        """Apply a reply; whether another answer follows."""
        result, rollout.failure = reply.result, reply.failure
        if rollout.failure is None and result is not None:
            try:
                token_ids = self._owner.codec.encode(result)
            except ValueError as error:
                rollout.failure = str(error)
            else:
                if len(rollout.token_ids) + len(token_ids) < self._sampling.max_tokens:
                    rollout.replied(result, token_ids)
                    return True
                rollout.stop_reason = "length"
        self._finish(rollout)
        return False

    def _finish(self, rollout: _Rollout) -> None:
        completion = rollout.completion(self._owner.codec)
        self._done[rollout.position * self._size + rollout.member] = completion
        if self._report is not None:
            self._report(rollout.position, rollout.member, completion)


def share_within(group: dist.ProcessGroup | None, first_rank: int) -> Broadcast:
    """Broadcast over the ranks of a share; without a group it has one rank."""

    def share(value: Any) -> Any:
        if group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=first_rank, group=group)
        return box[0]

    return share


def any_within(group: dist.ProcessGroup | None) -> Callable[[bool], bool]:
    """Whether something holds on any rank of a group; without one, on this rank."""

    def any_of(here: bool) -> bool:
        if group is None:
            return here
        holds = torch.tensor([int(here)])
        dist.all_reduce(holds, dist.ReduceOp.MAX, group=group)
        return bool(holds.item())

    return any_of
