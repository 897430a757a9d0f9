"""The recipes of papers: each passes every rule, says where its values come from, and has the numbers of its paper."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.config.load import load_config
from grpo_mega.config.schema import Config
from grpo_mega.parallel.topology import Topology
from grpo_mega.rewards.base import build_rewards
from tests.helpers.jobs import REPOSITORY

RECIPES = sorted((REPOSITORY / "configs" / "recipes").glob("*.yaml"))
# rollouts of a step, rollouts of an update, updates of a step, and what the paper is known for
NUMBERS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "deepseekmath-rl-7b": (1024, 1024, 1, {"kl_coef": 0.04, "advantage": "group_std"}),
    "r1-zero-style-32b": (8192, 512, 16, {"kl_coef": 0.001, "ref_update_every": 400 // 16}),
    "dapo-32b": (8192, 512, 16, {"clip_high": 0.28, "kl_coef": 0.0, "degenerate": "refill"}),
    "dr-grpo-7b": (1024, 128, 8, {"advantage": "group_mean", "aggregation": "rollout_sum", "kl_coef": 0.0}),
}


def test_there_is_a_recipe_for_each_paper() -> None:
    assert [path.stem for path in RECIPES] == sorted(NUMBERS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_passes_every_rule_and_splits_its_batch_as_the_paper_does(path: Path) -> None:
    config: Config = load_config(path)
    build_rewards(config.reward.terms, config.reward.timeout_seconds)
    Topology.of(config, config.run.world_size or 8)
    per_step, per_update, updates, algorithm = NUMBERS[path.stem]
    rollouts = config.data.prompts_per_step * config.sampling.group_size
    assert rollouts == per_step
    assert rollouts // config.train.minibatches_per_epoch == per_update
    assert config.train.minibatches_per_epoch * config.train.epochs_per_rollout == updates
    for key, value in algorithm.items():
        assert getattr(config.algorithm, key) == value, key


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_value_has_its_source(path: Path) -> None:
    """By a comment on its line, or on that of the section or list that holds it. Names of paths and keys need none."""
    commented, silent = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"( *)(?:- )?\{?(\w+):(.*)", line)
        if match is None or line.lstrip().startswith("#"):
            continue
        indent, key, rest = len(match[1]), match[2], match[3]
        commented = [at for at in commented if at < indent]
        if re.search(r"#.*\b(paper|script|ours)\b", rest):
            commented.append(indent)
        elif (
            rest.strip()
            and not commented
            and key not in ("name", "overlong", "template", "path", "prompt_key", "answer_key")
        ):
            silent.append(line.strip())
    assert silent == []
