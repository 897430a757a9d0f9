"""Sampling options: evaluation has them, training rejects each with the reason, and bad values are errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from grpo_mega.config.load import config_from_values, load_config, resolved
from grpo_mega.config.rollout_sections import EvaluationConfig, SamplingConfig
from grpo_mega.config.sampling_options import EVALUATION_ONLY
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
VALUES = {
    "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.5,
    "frequency_penalty": -0.5, "logit_bias": {15: -100.0, 3: 1.5}, "bad_words": ["no", "never"],
}  # fmt: skip


def test_evaluation_has_every_option_and_training_none() -> None:
    assert set(VALUES) == set(EVALUATION_ONLY)
    assert set(EVALUATION_ONLY) <= EvaluationConfig.model_fields.keys()
    assert not set(EVALUATION_ONLY) & SamplingConfig.model_fields.keys()


@pytest.mark.parametrize("name", EVALUATION_ONLY)
def test_an_option_in_training_is_an_error_with_the_reason(name: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(QUICKSTART, [f"sampling.{name}={json.dumps(VALUES[name])}"])
    assert_names(error.value, f"sampling.{name}", "not supported in training", "importance ratio", f"evaluation.{name}")


@pytest.mark.parametrize("name", EVALUATION_ONLY)
def test_an_option_of_an_evaluation_survives_the_config_of_a_run_and_json(name: str) -> None:
    config = load_config(QUICKSTART, [f"evaluation.{name}={yaml.safe_dump(VALUES[name], default_flow_style=True)}"])
    wanted = tuple(VALUES[name]) if name == "bad_words" else VALUES[name]  # type: ignore[arg-type]
    assert getattr(config.evaluation, name) == wanted
    for stored in (json.loads(json.dumps(resolved(config))), yaml.safe_load(yaml.safe_dump(resolved(config)))):
        assert getattr(config_from_values(stored, [], []).evaluation, name) == wanted


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluation.top_p=0", ["evaluation.top_p=0", "greater than 0"]),
        ("evaluation.top_p=1.1", ["evaluation.top_p=1.1", "less than or equal to 1"]),
        ("evaluation.top_k=0", ["evaluation.top_k=0", "greater than or equal to 1"]),
        ("evaluation.min_p=-0.1", ["evaluation.min_p=-0.1", "greater than or equal to 0"]),
        ("evaluation.repetition_penalty=0", ["evaluation.repetition_penalty=0", "greater than 0"]),
        ("evaluation.presence_penalty=3", ["evaluation.presence_penalty=3", "less than or equal to 2"]),
        ("evaluation.frequency_penalty=x", ["evaluation.frequency_penalty='x'", "number"]),
        ("evaluation.logit_bias={3: 101}", ["evaluation.logit_bias.3=101", "less than or equal to 100"]),
        ("evaluation.logit_bias={the: 1}", ["evaluation.logit_bias.the", "integer"]),
        ("evaluation.bad_words=['']", ["evaluation.bad_words.0=''", "at least 1 character"]),
    ],
)
def test_a_wrong_value_is_an_error_that_names_key_and_rule(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(QUICKSTART, [override])
    assert_names(error.value, *words)


def test_sglang_rejects_bad_words() -> None:
    with pytest.raises(UserError) as error:
        load_config(QUICKSTART, ["engine.kind=sglang", "evaluation.bad_words=[never]"])
    assert_names(error.value, "evaluation.bad_words=['never']", "engine.kind=sglang", "evaluation.logit_bias")


def test_sglang_rejects_a_repetition_penalty() -> None:
    with pytest.raises(UserError) as error:
        load_config(QUICKSTART, ["engine.kind=sglang", "evaluation.repetition_penalty=1.5"])
    assert_names(error.value, "evaluation.repetition_penalty=1.5", "engine.kind=sglang", "engine.kind=vllm")
