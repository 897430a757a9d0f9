"""Groups of rollouts as HTML for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from tensorboard.plugin_util import markdown_to_safe_html

from grpo_mega.observe.group_texts import MAX_ANSWERS, MAX_TOKENS, group_texts, render_group, shown_groups
from grpo_mega.observe.rollout_files import plain_rows
from grpo_mega.observe.rollout_files.plain_rows import RolloutRow
from grpo_mega.types import Completion, Reward, Rollout
from tests.helpers.observed_rollouts import columns_of_rollouts, make_rollout


def rows_of(texts: Sequence[str], rewards: Sequence[float], index: int = 7) -> list[RolloutRow]:
    return plain_rows.rows_of(columns_of_rollouts(rollouts_of(texts, rewards, index), [r - 0.5 for r in rewards]))


def rollouts_of(texts: Sequence[str], rewards: Sequence[float], index: int = 7) -> list[Rollout]:
    rollouts = [make_rollout(reward, text) for reward, text in zip(rewards, texts, strict=True)]
    return [replace(r, prompt=replace(r.prompt, index=index)) for r in rollouts]


def repeated(text: str, ids: Sequence[int]) -> list[str]:
    return [text] * len(ids)


def test_the_answers_of_a_group_are_columns_from_the_best_to_the_worst() -> None:
    shown = render_group(rows_of(["wrong", "right"], [0.0, 1.0]), None)
    assert shown.index("right") < shown.index("wrong")
    assert "prompt 7, reference answer <code>46</code>, 2 of 2 answers" in shown
    assert "\U0001f7e9 reward 1, advantage +0.500, 3 tokens, eos" in shown
    assert "\U0001f7e5 reward 0, advantage -0.500, 3 tokens, eos" in shown
    assert "exact 1, format failed" in shown
    assert "<pre>12+34=</pre>" in shown


def test_a_rollout_without_a_reward_is_last() -> None:
    lost = replace(make_rollout(text="lost"), reward=Reward(None, {}, ("judge",)))
    rows = plain_rows.rows_of(columns_of_rollouts([lost, make_rollout(0.0, "wrong")], [0.0, -1.0]))
    shown = render_group(rows, None)
    assert shown.index("wrong") < shown.index("lost")
    assert "reward none" in shown


def test_groups_from_the_best_to_the_worst_and_at_most_four_answers_are_shown() -> None:
    rewards = {3: [0.0] * 6, 1: [1.0] * 6, 2: [0.5] * 6, 9: [0.2, 0.3, 0.1, 0.0, 0.4, 0.5]}
    rollouts = [r for index, values in rewards.items() for r in rollouts_of(list("abcdef"), values, index)]
    columns = columns_of_rollouts(rollouts, [0.0] * 24, group_size=6)
    by_group = columns.reward.reshape(4, 6)
    assert shown_groups(by_group, 2) == [1, 0]
    replicas = [columns.take(np.flatnonzero(columns.group % 2 == i)) for i in range(2)]  # as two replicas sample them
    found = group_texts(replicas, shown_groups(by_group, 2), None)
    assert list(found) == ["groups/0", "groups/1"]
    assert "prompt 1," in found["groups/0"]
    assert "prompt 3," in found["groups/1"]
    assert found["groups/0"].count("<td><pre>") == MAX_ANSWERS
    assert shown_groups(by_group, 0) == []
    assert group_texts(replicas, [], None) == {}
    assert len(group_texts(replicas, shown_groups(by_group, 9), None)) == 4


def test_tokens_have_the_color_of_their_mismatch() -> None:
    sampled = (-0.5, -0.25, -0.125)
    rollout = replace(make_rollout(), completion=Completion((4, 6, 0), sampled, "eos", 3, "46"))
    (row,) = plain_rows.rows_of(columns_of_rollouts([rollout], [0.5], [[-0.5, -0.25 + 0.05, -0.125 - 2]]))
    shown = render_group([row], lambda ids: [f"<{token}>" for token in ids])
    assert "&lt;4&gt;\u00b7\U0001f7e8&lt;6&gt;\u00b7\U0001f7e5&lt;0&gt;" in shown
    many = replace(rollout, completion=Completion((4,) * 200, (-1.0,) * 200, "length", 3, "4" * 200))
    (long,) = plain_rows.rows_of(columns_of_rollouts([many], [0.5], [[-1.0] * 200]))
    assert f"[{200 - MAX_TOKENS} more tokens]" in render_group([long], lambda ids: ["x"] * len(ids))


def test_no_text_escapes_its_cell_in_the_page_of_tensorboard() -> None:
    hostile = [
        "</pre></td></table><script>alert(1)</script>",
        "\x1b[2J\x9b31m",
        "\ud800 \udfff",
        "x" * 1_000_000,
        "```\n# heading\n\n<img src=x onerror=alert(1)>",
        "a\n\nb | c\n---|---",
    ]
    for text in hostile:
        (row,) = rows_of([text], [1.0])
        row["prompt"] = row["answer"] = row["data_set"] = text
        row["old_log_probs"] = row["sampler_log_probs"]
        shown = render_group([row], partial(repeated, text))
        assert len(shown.encode("utf-8")) < 30_000
        page = markdown_to_safe_html(shown)
        assert page.count("<table>") == page.count("</table>") == 1
        assert "<script" not in page
        assert "<img" not in page
        assert "<h1" not in page
        assert "\x1b" not in page
        assert "\x9b" not in page
    assert "[998,500 more characters]" in render_group(rows_of(["x" * 1_000_000], [1.0]), None)
