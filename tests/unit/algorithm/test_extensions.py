"""User-defined surrogates and advantage estimators in one file, and the table of the built-in ones."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

from grpo_mega.algorithm import advantages, surrogates
from grpo_mega.config.algorithm_parts import PARTS, PartKind, find_part, signature_keys
from grpo_mega.config.algorithm_rules import check_algorithm
from grpo_mega.config.algorithm_section import AlgorithmConfig
from grpo_mega.types import UserError
from tests.helpers.algorithm_oracle import compute_update_loss, make_data

EXTENSION = """
import torch

from grpo_mega.algorithm import Estimates, StepRewards, advantage, surrogate


@surrogate
def squared_ratio(log_probs, log_ratio, advantages, segments, *, clip_high, dual_clip=None):
    return (2 * log_ratio.clamp(max=clip_high)).exp() * advantages, log_ratio > clip_high


@advantage
def raw_reward(step: StepRewards) -> Estimates:
    return Estimates(list(step.rewards))


@surrogate
def with_unknown_key(log_probs, log_ratio, advantages, segments, *, margin):
    return log_ratio * advantages, advantages > margin


@surrogate
def too_few(log_probs, log_ratio):
    return log_ratio, log_ratio > 0


@surrogate
class NotAFunction:
    pass


@advantage
def too_many(step, other):
    return Estimates(list(step.rewards))


def undeclared(log_probs, log_ratio, advantages, segments):
    return log_ratio * advantages, advantages > 0
"""


@pytest.fixture
def extension_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_algorithm.py").write_text(EXTENSION)
    monkeypatch.chdir(tmp_path)
    return "./my_algorithm.py"


def algorithm(**keys: object) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"kl_coef": 0.0, "clip_low": None} | keys)


def test_one_file_adds_a_surrogate_and_an_advantage_that_train_a_loss(extension_module: str) -> None:
    config = algorithm(
        surrogate=f"{extension_module}:squared_ratio", advantage=f"{extension_module}:raw_reward", clip_high=0.3
    )
    check_algorithm(config)
    data = make_data()
    loss, batches = compute_update_loss(data, config)
    rewards = batches[0].rewards
    parts = [
        (2 * data.differ(i).clamp(max=0.3)).exp().mean() * torch.tensor(reward) for i, reward in enumerate(rewards)
    ]
    expected = -torch.stack(parts).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    found = torch.cat(torch.autograd.grad(loss, data.log_probs))
    torch.testing.assert_close(found, torch.cat(torch.autograd.grad(expected, data.log_probs)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"surrogate": "clipd_ratio"}, r"algorithm\.surrogate='clipd_ratio'.*did you mean 'clipped_ratio'"),
        ({"advantage": "group_sdt", "clip_low": 0.2}, r"algorithm\.advantage='group_sdt'.*did you mean 'group_std'"),
        ({"surrogate": "./missing.py:x"}, r"algorithm\.surrogate='\./missing\.py:x': no such file"),
        ({"surrogate": "no_such_package:x"}, r"algorithm\.surrogate='no_such_package:x': cannot import"),
        ({"surrogate": "{file}:absent"}, r"has no function 'absent'; its surrogates: .*squared_ratio"),
        ({"surrogate": "{file}:raw_reward"}, r"is declared with @grpo_mega\.algorithm\.advantage"),
        ({"surrogate": "{file}:too_few"}, r"must be a function of 4 positional argument.*def too_few\(log_probs"),
        ({"surrogate": "{file}:NotAFunction"}, r"must be a function of 4 positional argument"),
        (
            {"advantage": "{file}:too_many", "clip_low": 0.2},
            r"must be a function of 1 positional argument.*def too_many\(step",
        ),
        ({"surrogate": "{file}:with_unknown_key", "clip_high": None}, r"parameter 'margin' is not a key of algorithm"),
        ({"surrogate": "{file}:squared_ratio", "clip_low": 0.2}, r"algorithm\.clip_low=0\.2 does nothing"),
        ({"surrogate": "{file}:squared_ratio", "clip_high": None}, r"algorithm\.clip_high=null.*needs a value"),
    ],
)
def test_a_wrong_name_or_key_is_an_error_when_the_config_is_checked(
    extension_module: str, keys: dict[str, object], message: str
) -> None:
    given = {
        key: value.format(file=extension_module) if isinstance(value, str) else value for key, value in keys.items()
    }
    with pytest.raises(UserError, match=message):
        check_algorithm(algorithm(**given))


def test_a_function_needs_no_decorator(extension_module: str) -> None:
    config = algorithm(surrogate=f"{extension_module}:undeclared", clip_high=None)
    check_algorithm(config)
    loss, _ = compute_update_loss(make_data(), config)
    assert loss.requires_grad


@pytest.mark.parametrize("kind", PARTS)
def test_the_table_lists_the_keys_of_each_built_in_function(kind: PartKind) -> None:
    for name, part in PARTS[kind].items():
        assert signature_keys(find_part(kind, name)) == (part.required, part.optional), name


@pytest.mark.parametrize(("kind", "package"), [("surrogate", surrogates), ("advantage", advantages)])
def test_every_declared_function_of_the_package_has_a_name(kind: PartKind, package: object) -> None:
    declared = set()
    for info in pkgutil.iter_modules(package.__path__):  # type: ignore[attr-defined]
        module = importlib.import_module(f"{package.__name__}.{info.name}")  # type: ignore[attr-defined]
        declared |= {
            f"{module.__name__}:{name}"
            for name, value in vars(module).items()
            if getattr(value, "__algorithm_declaration__", None) == kind and value.__module__ == module.__name__
        }
    assert declared == {part.path for part in PARTS[kind].values()}
