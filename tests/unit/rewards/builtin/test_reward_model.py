"""`reward_model` returns the logit of a tiny classifier, the same in any batch, and rejects other models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForSequenceClassification

from grpo_mega.config.rollout_sections import RewardTerm
from grpo_mega.rewards import build_rewards
from grpo_mega.rewards.batched import ScoringRow
from grpo_mega.rewards.pool import RewardPool
from grpo_mega.types import UserError
from tests.helpers.all_rewards import LETTERS, tiny_reward_model

COMPLETIONS = ["a", "bcd", "", "hhhhhhhh", "thecabbage", "\ud800"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward_model")
    tiny_reward_model(path)
    return path


def scored(folder: Path, **args: Any) -> list[float]:
    (component,) = build_rewards([RewardTerm(name="reward_model", args={"path": str(folder), "max_tokens": 32} | args)])
    scorer = component.open()
    for key, completion in enumerate(COMPLETIONS):
        scorer.submit(key, ScoringRow("ab", completion, ""))
    values = scorer.collect()
    assert scorer.collect() == {}
    scorer.close()
    return [component.checked(values[key]) for key in range(len(COMPLETIONS))]


def logit_of(folder: Path, text: str) -> float:
    model = Qwen2ForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    known = ["<pad>", "?", *LETTERS]
    ids = [known.index(letter if letter in known else "?") for letter in text]
    with torch.inference_mode():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


def test_the_value_is_the_sigmoid_of_the_logit_of_prompt_and_completion(folder: Path) -> None:
    expected = [1 / (1 + math.exp(-logit_of(folder, "ab" + text))) for text in COMPLETIONS]
    assert scored(folder) == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 0.05


def test_the_value_does_not_depend_on_the_batch(folder: Path) -> None:
    assert scored(folder, batch_size=1) == pytest.approx(scored(folder, batch_size=4), abs=1e-6)


def test_the_logit_is_clamped_to_the_bound(folder: Path) -> None:
    logits = [logit_of(folder, "ab" + text) for text in COMPLETIONS]
    bound = sorted(map(abs, logits))[len(logits) // 2]
    assert scored(folder, bound=bound) == pytest.approx([min(bound, max(-bound, x)) for x in logits], abs=1e-5)
    (component,) = build_rewards(
        [RewardTerm(name="reward_model", args={"path": str(folder), "max_tokens": 9, "bound": 4})]
    )
    assert (component.low, component.high) == (-4, 4)


def test_a_long_text_loses_its_beginning(folder: Path) -> None:
    expected = [1 / (1 + math.exp(-logit_of(folder, ("ab" + text)[-3:]))) for text in COMPLETIONS]
    assert scored(folder, max_tokens=3) == pytest.approx(expected, abs=1e-6)


def test_chat_applies_the_models_own_chat_template(folder: Path) -> None:
    expected = [1 / (1 + math.exp(-logit_of(folder, f"uaba{text}"))) for text in COMPLETIONS]
    assert scored(folder, chat=True) == pytest.approx(expected, abs=1e-6)


def test_chat_gets_the_messages_and_not_the_text_that_the_policy_got(folder: Path) -> None:
    (component,) = build_rewards(
        [RewardTerm(name="reward_model", args={"path": str(folder), "max_tokens": 32, "chat": True})]
    )
    messages = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    expected = 1 / (1 + math.exp(-logit_of(folder, "uabacudaef")))
    assert component("uabacuda", "ef", "", messages=messages) == pytest.approx(expected, abs=1e-6)


def test_the_pool_adds_it_to_other_rewards(folder: Path) -> None:
    terms = [RewardTerm(name="reward_model", args={"path": str(folder), "max_tokens": 32}), RewardTerm(name="exact")]
    with RewardPool(terms, workers=1, timeout_seconds=30.0) as pool:
        for key, completion in enumerate(COMPLETIONS):
            pool.submit(key, "ab", completion, "bcd")
        rewards = pool.collect()
    found = [rewards[key].components for key in range(len(COMPLETIONS))]
    assert [components["reward_model"] for components in found] == pytest.approx(scored(folder), abs=1e-6)
    assert [components["exact"] for components in found] == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"path": "/no/such/folder"}, "config.json cannot be read"),
        ({"bound": 0}, "bound=0 must be a finite number above 0"),
        ({"chat": 1}, "chat=1 must be true or false"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"max_tokens": 65}, "max_tokens=65 must be at most 64"),
    ],
)
def test_a_bad_argument_is_rejected_before_the_run(folder: Path, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_rewards([RewardTerm(name="reward_model", args={"path": str(folder), "max_tokens": 8} | args)])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "must be a ...ForSequenceClassification"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "has 2 labels; a reward model must have one"),
    ],
)
def test_a_model_that_is_not_a_reward_model_is_rejected(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        build_rewards([RewardTerm(name="reward_model", args={"path": str(tmp_path)})])
    assert message in str(caught.value)
