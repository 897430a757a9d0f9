"""Rollouts in progress: versions, routing records and stop texts across the seam between two slices, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from grpo_mega.environments.base import Turn
from grpo_mega.rollout.open_rollout import OpenRollout, cut_at_seam
from grpo_mega.types import Completion, Prompt
from tests.helpers.scripted_slices import Characters

PROMPT = Prompt(4, "p", (9, 9), "a")


def sampled(text: str, version: int, record: torch.Tensor | None = None) -> Completion:
    tokens = list(map(ord, text))
    return Completion(tokens, [-float(version)] * len(tokens), "length", version, text, record)


def test_a_rollout_of_several_weights_keeps_the_version_of_every_token() -> None:
    rollout = OpenRollout(PROMPT)
    assert (rollout.oldest_version, rollout.next_prompt()) == (None, PROMPT)
    rollout.add_sampled(sampled("ab", 3))
    before = rollout.copy()
    rollout.add_sampled(replace(sampled("c", 5), stop_reason="stop"))
    rollout.end_answer(Turn("abc"))
    rollout.add_reply("R", [ord("R")])
    rollout.add_sampled(replace(sampled("d", 5), stop_reason="eos"))
    assert rollout.next_prompt().token_ids == (9, 9, *map(ord, "abcRd"))
    assert rollout.answer_ids == [ord("d")]
    rollout.end_answer(Turn("d"))
    found = rollout.completion(Characters().decode)
    assert (found.text, found.stop_reason, found.policy_version, found.num_turns) == ("abcRd", "eos", 5, 2)
    assert found.policy_versions is not None
    assert found.policy_versions.tolist() == [3, 3, 5, -1, 5]
    assert found.loss_mask is not None
    assert found.loss_mask.tolist() == [True, True, True, False, True]
    assert found.sampler_log_probs.tolist() == [-3, -3, -5, 0, -5]
    assert rollout.oldest_version == 3
    assert (before.num_tokens, before.turns) == (2, []), "the copy is not changed"


def test_tokens_of_one_version_need_no_versions() -> None:
    rollout = OpenRollout(PROMPT)
    for text in ("ab", "c"):
        rollout.add_sampled(sampled(text, 3))
    assert rollout.completion(Characters().decode).policy_versions is None


def test_tokens_keep_the_routing_record_of_the_weights_that_sampled() -> None:
    """The second call computes the whole sequence with other weights: only what had no record takes its record."""
    rollout = OpenRollout(PROMPT)
    first, second = torch.full((3, 1, 1), 1, dtype=torch.uint8), torch.full((6, 1, 1), 2, dtype=torch.uint8)
    rollout.add_sampled(sampled("ab", 3, first))  # 2 + 2 tokens; the last one has no record
    rollout.add_sampled(sampled("c", 5, second))
    assert rollout.expert_choices is not None
    assert rollout.expert_choices[:, 0, 0].tolist() == [1, 1, 1, 2, 2], "and none behind its last token"


@pytest.mark.parametrize(
    ("before", "new", "expected", "reason"),
    [
        ("x</ca", "lc>yz", "lc>", "stop"),  # the stop text begins before the seam
        ("x</calc", ">", ">", "stop"),
        ("x", "</calc>", "</calc>", "stop"),
        ("x</ca", "ll>yz", "ll>yz", "length"),
        ("", "</calc>", "</calc>", "length"),
    ],
)
def test_a_stop_text_across_the_seam_ends_the_answer(before: str, new: str, expected: str, reason: str) -> None:
    found = cut_at_seam(list(map(ord, before)), sampled(new, 1), Characters(), ("</calc>",))
    assert ("".join(map(chr, found.token_ids)), found.stop_reason) == (expected, reason)
    assert len(found.sampler_log_probs) == len(expected)
