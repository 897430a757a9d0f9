"""Ranks that were started with other configs or other prompts end with a message that names key and rank."""

from __future__ import annotations

from typing import Any

from grpo_mega.data.dataset import DataSet, PromptDataset
from grpo_mega.trainer.equal_inputs import require_equal_inputs
from grpo_mega.types import Prompt, UserError
from tests.helpers.error_messages import assert_names
from tests.helpers.ranks import RankPool
from tests.helpers.recorded_rollouts import Layout, ranks_of

CONFIG: dict[str, Any] = {"optimizer": {"lr": 1e-6}, "data": {"train": "/data/a.jsonl"}, "model": {"revision": None}}


def prompts_of(*texts: str) -> PromptDataset:
    return PromptDataset((DataSet("a", tuple(Prompt(i, text, (1,), "2") for i, text in enumerate(texts))),))


def messages(rank: int, changed: dict[int, dict[str, Any]], other_prompts: dict[int, list[str]]) -> str:
    """Return the message of this rank, or "" if all inputs are equal."""
    values = CONFIG | changed.get(rank, {})
    prompts = prompts_of(*other_prompts.get(rank, ["1 + 1"]))
    try:
        require_equal_inputs(values, prompts, None, ranks_of(rank, Layout(3)))
    except UserError as error:
        return str(error)
    return ""


def test_equal_inputs_pass(rank_pool: RankPool) -> None:
    assert rank_pool.call(3, messages, {}, {}) == ["", "", ""]


def test_every_rank_names_the_key_and_the_rank_that_differ(rank_pool: RankPool) -> None:
    found = rank_pool.call(3, messages, {2: {"optimizer": {"lr": 1e-5}}}, {})
    assert len(set(found)) == 1
    assert_names(found[0], "rank 2", "optimizer.lr=1e-05", "rank 0: 1e-06", "same command")


def test_other_rows_under_the_same_path_are_named(rank_pool: RankPool) -> None:
    found = rank_pool.call(3, messages, {}, {1: ["1 + 2"]})
    assert len(set(found)) == 1
    assert_names(found[0], "rank 1", "rows of data.train=", "rank 0: ", "same files")
