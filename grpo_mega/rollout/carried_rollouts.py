"""Groups of a prompt shard that are not complete at the end of a step, and the prompts that the shard samples next.

The prompts of a run have numbers: those of step s are s * P to (s + 1) * P - 1 with P prompts per step, in the order of
the data set. Shard i takes the numbers s * P + i, s * P + i + S, ... of each step s, one after the other, where S is
the number of shards. A prompt that was taken is trained once: if its group is dropped, the prompt is sampled again.
Asserted by tests/unit/rollout/test_carried_rollouts.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor

from grpo_mega.data.rollout_tokens import offsets_of
from grpo_mega.environments.base import Turn
from grpo_mega.rollout.open_rollout import OpenRollout, RolloutPart
from grpo_mega.types import Prompt

FORMAT = 1
"""Version of the files of carried rollouts."""
_HEADER = "header"  # JSON as bytes: safetensors.numpy.load returns no metadata
PromptOf = Callable[[int], Prompt]
"""Function that returns the prompt of a number."""


@dataclass(frozen=True, eq=False)
class OpenGroup:
    """The G rollouts of a prompt, of which some may be complete.

    `is_second` is True if an earlier group of the prompt was dropped because of its age.
    """

    number: int
    rollouts: tuple[OpenRollout, ...]
    is_second: bool = False

    @property
    def is_done(self) -> bool:
        """True if all rollouts are complete."""
        return all(rollout.is_done for rollout in self.rollouts)

    @property
    def oldest_version(self) -> int | None:
        """Version of the oldest weights that sampled one of its tokens; None before the first token."""
        versions = [version for rollout in self.rollouts if (version := rollout.oldest_version) is not None]
        return min(versions, default=None)

    @property
    def num_sampled(self) -> int:
        """Tokens of all rollouts, with those of environments."""
        return sum(rollout.num_tokens for rollout in self.rollouts)

    def copy(self) -> OpenGroup:
        """Return a group that can be continued without a change of this one."""
        return replace(self, rollouts=tuple(rollout.copy() for rollout in self.rollouts))


@dataclass(frozen=True)
class PromptShard:
    """Prompt shard `index` of `num_shards`, with `prompts_per_step` prompts of all shards together."""

    index: int
    num_shards: int
    prompts_per_step: int

    @property
    def quota(self) -> int:
        """Groups that the shard gives to a step."""
        return len(range(self.index, self.prompts_per_step, self.num_shards))

    def number(self, taken: int) -> int:
        """Return the number of the prompt that follows the first `taken` prompts of the shard."""
        step, place = divmod(taken, self.quota)
        return step * self.prompts_per_step + self.index + place * self.num_shards

    def to_json(self) -> dict[str, int]:
        """Return the values for a file of carried rollouts, whose keys stay the same."""
        return {"share": self.index, "num_shares": self.num_shards, "prompts_per_step": self.prompts_per_step}

    @classmethod
    def from_json(cls, values: Mapping[str, int]) -> PromptShard:
        """Return the shard that `to_json` wrote."""
        return cls(values["share"], values["num_shares"], values["prompts_per_step"])


@dataclass(frozen=True, eq=False)
class CarriedRollouts:
    """Rollouts and prompts that a prompt shard carries from one step to the next.

    Attributes:
        shard: the shard.
        taken: prompts of the shard's own order that were taken so far.
        groups: open groups and complete groups that no step has used, in the order in which they were begun.
        waiting: (number, is_second) of prompts that are sampled before further ones of the order.
    """

    shard: PromptShard
    taken: int
    groups: tuple[OpenGroup, ...] = ()
    waiting: tuple[tuple[int, bool], ...] = ()

    @classmethod
    def after_step(cls, step: int, shard: PromptShard) -> CarriedRollouts:
        """Return the state after `step` steps that carried nothing."""
        return cls(shard, step * shard.quota)

    @property
    def num_tokens(self) -> int:
        """Tokens that were sampled and not trained on."""
        return sum(group.num_sampled for group in self.groups)

    def drop(self, is_dropped: Callable[[OpenGroup], bool], *, is_second: bool) -> CarriedRollouts:
        """Drop groups; their prompts are sampled again before all others.

        Args:
            is_dropped: True for the groups to drop.
            is_second: mark the prompts as sampled a second time.
        """
        dropped = tuple((g.number, is_second or g.is_second) for g in self.groups if is_dropped(g))
        kept = tuple(group for group in self.groups if not is_dropped(group))
        return replace(self, groups=kept, waiting=(*dropped, *self.waiting)) if dropped else self

    def fill(self, num_groups: int, group_size: int, prompt_of: PromptOf) -> CarriedRollouts:
        """Begin groups of further prompts until there are `num_groups`."""
        waiting, taken, new = list(self.waiting), self.taken, list[OpenGroup]()
        for _ in range(num_groups - len(self.groups)):
            if waiting:
                number, is_second = waiting.pop(0)
            else:
                number, is_second = self.shard.number(taken), False
                taken += 1
            prompt = prompt_of(number)
            new.append(OpenGroup(number, tuple(OpenRollout(prompt) for _ in range(group_size)), is_second))
        return replace(self, taken=taken, groups=(*self.groups, *new), waiting=tuple(waiting))

    def to_bytes(self) -> bytes:
        """Return the content of a safetensors file: columns of tokens, and JSON for texts."""
        rollouts = [rollout for group in self.groups for rollout in group.rollouts]
        parts = [part for rollout in rollouts for part in rollout.parts]
        records = [rollout.expert_choices for rollout in rollouts]
        header = {
            "format": FORMAT,
            "shard": self.shard.to_json(),
            "taken": self.taken,
            "waiting": self.waiting,
            "groups": [[group.number, group.is_second, len(group.rollouts)] for group in self.groups],
            "rollouts": [
                {
                    "parts": len(rollout.parts),
                    "turns": [[turn.answer, turn.result, turn.stop_text] for turn in rollout.turns],
                    "answer_start": rollout.answer_start,
                    "stop_reason": rollout.stop_reason,
                    "failure": rollout.failure,
                    "is_done": rollout.is_done,
                    "record": None if record is None else len(record),
                }
                for rollout, record in zip(rollouts, records, strict=True)
            ],
        }
        columns: dict[str, NDArray[Any]] = {
            _HEADER: np.frombuffer(json.dumps(header).encode(), np.uint8),
            "part_lengths": np.array([len(part.token_ids) for part in parts], np.int64),
            "part_versions": np.array([part.policy_version for part in parts], np.int32),
            "token_ids": np.concatenate([np.zeros(0, np.int32), *(part.token_ids for part in parts)]),
            "log_probs": np.concatenate([np.zeros(0, np.float32), *(part.log_probs for part in parts)]),
        }
        known = [record for record in records if record is not None]
        if known:
            columns["expert_choices"] = torch.cat(known).numpy()
        return bytes(save(columns))

    @classmethod
    def from_bytes(cls, content: bytes, prompt_of: PromptOf) -> CarriedRollouts:
        """Return the state that `to_bytes` wrote.

        Args:
            content: of the file.
            prompt_of: returns the prompt of a number.

        Raises:
            ValueError: another version of this program wrote it.
        """
        columns = load(content)
        header = json.loads(columns[_HEADER].tobytes())
        if header["format"] != FORMAT:
            raise ValueError(f"format={header['format']} of carried rollouts; this program reads {FORMAT}")
        prompts = [prompt_of(number) for number, _, size in header["groups"] for _ in range(size)]
        rollouts = _rollouts(header["rollouts"], prompts, columns)
        groups = [
            OpenGroup(number, tuple(islice(rollouts, size)), is_second) for number, is_second, size in header["groups"]
        ]
        waiting = tuple((number, is_second) for number, is_second in header["waiting"])
        return cls(PromptShard.from_json(header["shard"]), header["taken"], tuple(groups), waiting)


def redistribute(parts: Sequence[CarriedRollouts], shard: PromptShard) -> CarriedRollouts:
    """Return the part of `shard`, out of those of all shards of another number of shards.

    Groups and waiting prompts are dealt out in the order of their numbers. All shards continue with the first step of
    which no old shard has taken a prompt; the prompts before it that no shard has taken wait.

    Args:
        parts: of all old shards, in their order.
        shard: new shard.
    """
    old = [part.shard for part in parts]
    assert all(each.prompts_per_step == shard.prompts_per_step for each in old), "data.prompts_per_step is frozen"
    next_step = max(-(-part.taken // part.shard.quota) for part in parts if part.shard.quota)
    groups = sorted((group for part in parts for group in part.groups), key=lambda group: group.number)
    waiting = [each for part in parts for each in part.waiting]
    waiting += [
        (part.shard.number(place), False) for part in parts for place in range(part.taken, next_step * part.shard.quota)
    ]
    own = slice(shard.index, None, shard.num_shards)
    return CarriedRollouts(shard, next_step * shard.quota, tuple(groups[own]), tuple(sorted(waiting)[own]))


def _rollouts(
    rows: Sequence[dict[str, Any]], prompts: Sequence[Prompt], columns: dict[str, NDArray[Any]]
) -> Iterator[OpenRollout]:
    offsets = offsets_of(columns["part_lengths"]).tolist()
    versions, part, place = columns["part_versions"].tolist(), 0, 0
    for row, prompt in zip(rows, prompts, strict=True):
        stop = part + row["parts"]
        parts = [
            RolloutPart(columns["token_ids"][begin:end], columns["log_probs"][begin:end], version)
            for begin, end, version in zip(
                offsets[part:stop], offsets[part + 1 : stop + 1], versions[part:stop], strict=True
            )
        ]
        part = stop
        record: Tensor | None = None
        if row["record"] is not None:
            record = torch.from_numpy(columns["expert_choices"][place : place + row["record"]])
            place += row["record"]
        yield OpenRollout(
            prompt=prompt,
            parts=parts,
            turns=[Turn(answer, result, stop_text) for answer, result, stop_text in row["turns"]],
            answer_start=row["answer_start"],
            stop_reason=row["stop_reason"],
            failure=row["failure"],
            expert_choices=record,
            is_done=row["is_done"],
        )
