"""The groups of a step: replacement of groups, with the tokens and texts of this rank."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.types import Completion, Prompt, Reward, Rollout


def groups_of(*rewards: tuple[float, float], first: int) -> SampledGroups:
    """Return groups of two; rollout i has i % 3 + 1 tokens 10 * (first + i) + 1, ..."""
    rollouts = []
    for group, pair in enumerate(rewards):
        prompt = Prompt(first + group, "", (first + group,), "")
        for reward in pair:
            i = len(rollouts)
            tokens = [10 * (first + i) + k for k in range(i % 3 + 1)]
            completion = Completion(tokens, [-1.0] * len(tokens), "eos", 0, f"{first} {i}")
            failures = ("exact",) if i == 1 else ()
            rollouts.append(Rollout(prompt, completion, Reward(reward, {}, failures), 0))
    return SampledGroups.of(rollouts, 2)


def completions(groups: SampledGroups) -> dict[int, list[int]]:
    tokens = groups.tokens
    return {
        int(i): tokens.token_ids[begin + prompt : end].tolist()
        for i, begin, prompt, end in zip(
            tokens.ids, tokens.offsets[:-1], tokens.prompt_tokens, tokens.offsets[1:], strict=True
        )
    }


def test_degenerate_groups_are_replaced_by_useful_ones_by_hand() -> None:
    given = groups_of((0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (2.0, 2.0), first=1)
    spare = groups_of((3.0, 3.0), (4.0, 5.0), (6.0, 7.0), first=50)
    assert given.degenerate.tolist() == [True, False, True, True]
    found = given.replace_groups([0, 2, 3], spare)
    assert [prompt.index for prompt in found.prompts] == [51, 2, 52, 4]
    assert found.table.prompt_index.tolist() == [51, 51, 2, 2, 52, 52, 4, 4]
    assert found.table.reward.tolist() == [4, 5, 0, 1, 6, 7, 2, 2]
    assert found.num_discarded == 3
    assert completions(found) == {
        0: [520, 521, 522],
        1: [530],
        2: [30, 31, 32],
        3: [40],
        4: [540, 541],
        5: [550, 551, 552],
        6: [70],
        7: [80, 81],
    }
    assert found.texts == ["50 2", "50 3", "1 2", "1 3", "50 4", "50 5", "1 6", "1 7"]
    assert found.failures == [()] * 8
    assert groups_of((0.0, 1.0), first=1).failures == [(), ("exact",)]


def test_a_rank_keeps_only_its_own_rollouts_of_the_groups_that_stay() -> None:
    given = groups_of((0.0, 0.0), (0.0, 1.0), first=1)
    spare = groups_of((4.0, 5.0), first=50)
    elsewhere = spare.held_by(is_first=False)
    found = given.replace_groups([0], elsewhere)
    assert found.table.reward.tolist() == [4, 5, 0, 1]
    assert completions(found) == {2: [30, 31, 32], 3: [40]}
    assert found.texts == ["1 2", "1 3"]
    assert completions(given.held_by(is_first=False).replace_groups([0], spare)) == {0: [500], 1: [510, 511]}


def test_without_a_useful_group_nothing_is_replaced() -> None:
    given, spare = groups_of((0.0, 0.0), first=1), groups_of((1.0, 1.0), first=50)
    found = given.replace_groups([0], spare)
    assert completions(found) == completions(given)
    assert (found.num_discarded, given.num_discarded) == (1, 0)


def test_rollouts_of_a_group_must_have_one_prompt() -> None:
    completion = Completion([1], np.zeros(1), "eos", 0, "")
    rollouts = [Rollout(Prompt(i, "", (1,), ""), completion, Reward(0.0), 0) for i in range(2)]
    with pytest.raises(AssertionError, match="rollout 1 has not the prompt of its group"):
        SampledGroups.of(rollouts, 2)
