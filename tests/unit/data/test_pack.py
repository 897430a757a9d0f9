"""Packing of rollouts into rows."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from grpo_mega.types import Completion, Prompt, Reward, Rollout
from tests.helpers.packing import pack, unpack


def _rollout(prompt: Sequence[int], completion: Sequence[int], sampler_log_probs: Sequence[float] = ()) -> Rollout:
    return Rollout(
        prompt=Prompt(index=0, text="", token_ids=tuple(prompt), answer=""),
        completion=Completion(
            token_ids=tuple(completion),
            sampler_log_probs=tuple(sampler_log_probs) or tuple(-0.5 for _ in completion),
            stop_reason="eos",
            policy_version=0,
            text="",
        ),
        reward=Reward(0.0),
        replica=0,
    )


HAND = [
    (7, _rollout([11, 12, 13], [14, 15], [-1.0, -2.0])),
    (3, _rollout([21], [22], [-3.0])),
    (5, _rollout([31, 32], [33, 34, 35], [-4.0, -5.0, -6.0])),
]


def test_three_rollouts_packed_by_hand() -> None:
    row = pack(HAND, row_tokens=15, advantages=[1.0, -2.0, 0.5], token_weights=[0.25, 0.5, 0.125], pad_id=9)
    assert row.rollout_ids == (7, 3, 5)
    assert row.token_ids.tolist() == [11, 12, 13, 14, 15, 21, 22, 31, 32, 33, 34, 35, 9, 9, 9]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 0, 1, 2]
    assert row.labels.tolist() == [12, 13, 14, 15, 9, 22, 9, 32, 33, 34, 35, 9, 9, 9, 9]
    mask = [0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    assert row.loss_mask.tolist() == [bool(m) for m in mask]
    assert row.cu_seqlens.tolist() == [0, 5, 7, 12, 15]
    assert row.token_mask is not None
    assert row.token_mask.tolist() == [True] * 12 + [False] * 3
    assert row.advantages.tolist() == [0, 0, 1, 1, 0, -2, 0, 0, 0.5, 0.5, 0.5, 0, 0, 0, 0]
    assert row.token_weights.tolist() == [0, 0, 0.25, 0.25, 0, 0.5, 0, 0, 0.125, 0.125, 0.125, 0, 0, 0, 0]
    assert row.sampler_log_probs.tolist() == [0, 0, -1, -2, 0, -3, 0, 0, -4, -5, -6, 0, 0, 0, 0]
    assert row.num_loss_tokens == 6
    dtypes = (row.token_ids.dtype, row.cu_seqlens.dtype, row.advantages.dtype, row.loss_mask.dtype)
    assert dtypes == (torch.int64, torch.int32, torch.float32, torch.bool)


def _with_results(rollout: Rollout, *mask: int) -> Rollout:
    """Return a rollout whose tokens with mask 0 are those of an environment."""
    return replace(rollout, completion=replace(rollout.completion, loss_mask=tuple(bool(own) for own in mask)))


def test_tokens_of_an_environment_are_in_the_row_but_not_trained_on() -> None:
    # prompt 11 12; the policy says 13 14, the environment 15 16, the policy 17
    first = _with_results(_rollout([11, 12], [13, 14, 15, 16, 17], [-1.0, -2.0, 0.0, 0.0, -3.0]), 1, 1, 0, 0, 1)
    second = _with_results(_rollout([21], [22, 23], [-4.0, 0.0]), 1, 0)
    row = pack(
        [(0, first), (1, second)],
        row_tokens=12,
        advantages=[[1.0, 2.0, 3.0], -1.0],
        token_weights=[0.5, 0.25],
        pad_id=9,
    )
    assert row.token_ids.tolist() == [11, 12, 13, 14, 15, 16, 17, 21, 22, 23, 9, 9]
    assert row.labels.tolist() == [12, 13, 14, 15, 16, 17, 9, 22, 23, 9, 9, 9]
    # the positions that predict 13, 14, 17 and 22
    assert row.loss_mask.int().tolist() == [0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0]
    assert row.advantages.tolist() == [0, 1, 2, 0, 0, 3, 0, -1, 0, 0, 0, 0]
    assert row.token_weights.tolist() == [0, 0.5, 0.5, 0, 0, 0.5, 0, 0.25, 0, 0, 0, 0]
    assert row.sampler_log_probs.tolist() == [0, -1, -2, 0, 0, -3, 0, -4, 0, 0, 0, 0]
    assert unpack(torch.arange(12.0), row) == {0: [1.0, 2.0, 5.0], 1: [7.0]}


def test_a_mask_of_a_different_length_is_rejected() -> None:
    with pytest.raises(ValueError, match="a completion has 2 tokens and a loss_mask of 3"):
        _with_results(_rollout([1], [2, 3]), 1, 0, 1)


def test_segments_padded_to_a_multiple_by_hand() -> None:
    row = pack(
        HAND, row_tokens=20, advantages=[1.0, -2.0, 0.5], token_weights=[0.25, 0.5, 0.125], pad_id=9, segment_multiple=4
    )
    ids = [11, 12, 13, 14, 15, 9, 9, 9, 21, 22, 9, 9, 31, 32, 33, 34, 35, 9, 9, 9]
    assert row.token_ids.tolist() == ids
    assert row.position_ids.tolist() == [*range(8), *range(4), *range(8)]
    assert row.labels.tolist() == [12, 13, 14, 15, 9, 9, 9, 9, 22, 9, 9, 9, 32, 33, 34, 35, 9, 9, 9, 9]
    assert row.loss_mask.nonzero().squeeze(1).tolist() == [2, 3, 8, 13, 14, 15]
    assert row.cu_seqlens.tolist() == [0, 8, 12, 20]
    assert unpack(row.sampler_log_probs, row) == {7: [-1.0, -2.0], 3: [-3.0], 5: [-4.0, -5.0, -6.0]}
    with pytest.raises(ValueError, match="3 rollouts of 20 tokens in all do not fit a row of 16"):
        pack(HAND, row_tokens=16, advantages=[0] * 3, token_weights=[1] * 3, pad_id=9, segment_multiple=4)


def test_full_row_has_no_padding_segment() -> None:
    row = pack(HAND, row_tokens=12, advantages=[0, 0, 0], token_weights=[1, 1, 1], pad_id=0)
    assert row.cu_seqlens.tolist() == [0, 5, 7, 12]


def test_row_without_rollouts_has_no_loss_token() -> None:
    row = pack([], row_tokens=4, advantages=[], token_weights=[], pad_id=2)
    assert row.token_ids.tolist() == [2, 2, 2, 2]
    assert row.cu_seqlens.tolist() == [0, 4]
    assert row.num_loss_tokens == 0
    assert unpack(torch.ones(4), row) == {}


def test_loss_mask_does_not_depend_on_the_padding_token() -> None:
    row = pack([(0, _rollout([1, 2], [2, 2]))], row_tokens=6, advantages=[1], token_weights=[1], pad_id=2)
    assert row.loss_mask.tolist() == [False, True, True, False, False, False]


def test_rollouts_that_do_not_fit_the_row_are_rejected() -> None:
    with pytest.raises(ValueError, match="12 tokens in all do not fit a row of 11"):
        pack(HAND, row_tokens=11, advantages=[0, 0, 0], token_weights=[1, 1, 1], pad_id=0)


def test_missing_sampler_log_probs_are_rejected() -> None:
    with pytest.raises(ValueError, match="3 tokens and 1 sampler_log_probs"):
        _rollout([1], [2, 3, 4], [-1.0])


def test_expert_choices_are_at_their_tokens_and_other_tokens_have_no_record() -> None:
    told = _rollout([1, 2], [3, 4])
    choices = torch.arange(12, dtype=torch.int16).view(3, 2, 2)  # of three tokens, two layers, two experts
    told = replace(told, completion=replace(told.completion, expert_choices=choices))
    rollouts = [(0, _rollout([5], [6])), (1, told)]
    row = pack(rollouts, row_tokens=12, advantages=[0, 0], token_weights=[1, 1], pad_id=0, segment_multiple=4)
    assert row.expert_choices is not None
    assert row.expert_choices.dtype == torch.int16
    assert torch.equal(row.expert_choices[4:7], choices)
    assert row.expert_choices[[*range(4), *range(7, 12)]].eq(-1).all()
    assert pack(HAND, row_tokens=12, advantages=[0] * 3, token_weights=[1] * 3, pad_id=0).expert_choices is None
    assert pack([], row_tokens=4, advantages=[], token_weights=[], pad_id=0).expert_choices is None
    long = replace(told, completion=replace(told.completion, expert_choices=choices.repeat(2, 1, 1)))
    with pytest.raises(ValueError, match="expert choices of 6 tokens for a rollout of 4"):
        pack([(0, long)], row_tokens=12, advantages=[0], token_weights=[1], pad_id=0)


def test_unpack_inverts_pack_for_random_rollouts() -> None:
    rng = random.Random(0)
    for _ in range(100):
        rollouts = []
        for i in rng.sample(range(1000), rng.randrange(0, 6)):
            completion = [rng.randrange(99) for _ in range(rng.randrange(1, 7))]
            values = [float(-rng.randrange(1, 1000)) for _ in completion]
            rollouts.append((i, _rollout([rng.randrange(99) for _ in range(rng.randrange(1, 9))], completion, values)))
        total = sum(r.num_tokens for _, r in rollouts)
        weights = [1.0] * len(rollouts)
        row = pack(
            rollouts, row_tokens=total + rng.randrange(1, 5), advantages=weights, token_weights=weights, pad_id=0
        )
        assert unpack(row.sampler_log_probs, row) == {i: list(r.completion.sampler_log_probs) for i, r in rollouts}
        # What the marked positions predict are the completions' tokens.
        predicted = unpack(row.labels.float(), row)
        assert predicted == {i: [float(t) for t in r.completion.token_ids] for i, r in rollouts}
        # Inside a segment the label is the next token; across segments nothing is marked.
        marked = row.loss_mask.nonzero().flatten()
        assert torch.equal(row.labels[marked], row.token_ids[marked + 1])
        assert not row.loss_mask[row.cu_seqlens[1:].long() - 1].any()
