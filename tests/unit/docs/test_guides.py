"""The examples of docs/guides/ run as printed. The example of a model family is in tests/e2e/test_guides.py."""

from __future__ import annotations

import inspect
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_mega.algorithm import StepRewards
from grpo_mega.cli import main as cli
from grpo_mega.config.algorithm_parts import bound_part
from grpo_mega.config.load import load_config
from grpo_mega.config.shipped import find_config
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.train import Prepared, prepare
from tests.engine import test_engine_contract as contract
from tests.helpers.engine_contract import make_contract_models
from tests.helpers.engine_ranks import RankSession
from tests.helpers.guides import python_blocks, shell_blocks
from tests.helpers.jobs import REPOSITORY

GUIDES = sorted((REPOSITORY / "docs" / "guides").glob("*.md"))


@pytest.fixture
def write_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that writes the files of a guide into a folder from which they can be imported."""

    def write(guide: str) -> Path:
        for name, text in python_blocks(guide).items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return write


def command_arguments(guide: str, name: str, contains: str = "") -> list[str]:
    """Return the arguments of the guide's only command `grpo-mega NAME` that contains a text."""
    lines = [line for block in shell_blocks(guide) for line in block.splitlines()]
    (found,) = [line for line in lines if line.startswith(f"grpo-mega {name} ") and contains in line]
    return shlex.split(found, comments=True)[2:]


def prepare_job(guide: str) -> Prepared:
    """Return the training job of the guide after all checks before the start."""
    config, *overrides = command_arguments(guide, "train")
    return prepare(load_config(find_config(Path(config)), overrides))


def test_the_reward_scores_the_file_and_passes_the_checks_of_a_run(
    write_guide: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_guide("guides/reward.md")
    text = (REPOSITORY / "docs" / "guides" / "reward.md").read_text(encoding="utf-8")
    (rows,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (folder / "answers.jsonl").write_text(rows)
    assert cli.main(["score", *command_arguments("guides/reward.md", "score", "my_rewards:")]) == 0
    scored = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"prompt"')]
    assert [row["reward"] for row in scored] == [1.0, 0.5, 0.0]
    assert prepare_job("guides/reward.md").config.reward.terms[0].name == f"{folder}/my_rewards.py:closeness"


def test_the_reward_that_reads_columns_and_messages_scores_the_file(
    write_guide: Callable[[str], Path], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_guide("guides/reward.md")
    text = (REPOSITORY / "docs" / "guides" / "reward.md").read_text(encoding="utf-8")
    (rows,) = re.findall(r"```jsonl\n(.*?)```", text, re.DOTALL)
    (folder / "levels.jsonl").write_text(rows)
    assert cli.main(["score", *command_arguments("guides/reward.md", "score", "my_levels:")]) == 0
    scored = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"prompt"')]
    assert [row["reward"] for row in scored] == [0.5, 1.0, 0.0, None]
    assert "KeyError: 'level'" in caplog.text
    assert "for 1 of 4 completions" in caplog.text


def test_the_environment_replies_and_passes_the_checks_of_a_run(write_guide: Callable[[str], Path]) -> None:
    folder = write_guide("guides/environment.md")
    exec(compile((folder / "try_it.py").read_text(), "try_it.py", "exec"), {})
    environment = prepare_job("guides/environment.md").config.environment
    assert environment is not None
    assert environment.name == f"{folder}/my_tools.py:shop"


def test_the_algorithm_computes_its_formulas_and_passes_the_checks_of_a_run(write_guide: Callable[[str], Path]) -> None:
    write_guide("guides/algorithm.md")
    algorithm = prepare_job("guides/algorithm.md").config.algorithm
    surrogate, advantage = bound_part("surrogate", algorithm), bound_part("advantage", algorithm)
    log_probs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    log_ratio = log_probs - torch.tensor([-1.5, -1.0, -0.5])
    value, bounded = surrogate(log_probs, log_ratio, torch.tensor([1.0, -2.0, 1.0]), None)
    value.sum().backward()
    low = math.exp(-0.5)
    torch.testing.assert_close(value, torch.tensor([1.0 + algorithm.clip_high, -2.0, low]))
    torch.testing.assert_close(log_probs.grad, torch.tensor([0.0, -2.0, low]))
    assert bounded.tolist() == [True, False, False]
    step = StepRewards(rewards=[0.0, 1.0, 1.0, 0.0, 0.0, 3.0], group_size=3)
    assert advantage(step).advantages == [-1.0, 0.0, 0.0, 0.0, 0.0, 3.0]


class OneRank:
    """A replacement of `EngineRanks` with one rank, in this process."""

    def __init__(self, engine: Any) -> None:
        self._session = RankSession(0, engine)

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return [function(self._session, *args)]


def contract_tests() -> list[Callable[..., None]]:
    """Return the tests of the engine contract that apply to this engine."""
    found = []
    for name, test in vars(contract).items():
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.args[:1] == ("opened",)]
        # the options of an evaluation are optional for an engine, and this one rejects them
        if not name.startswith("test_") or "SamplingOptions" in inspect.getsource(test):
            continue
        if all("vllm" in mark.args[1] for mark in marks):
            found.append(test)
    return found


def test_the_engine_passes_the_contract(
    write_guide: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    write_guide("guides/engine.md")
    from transformers_engine import TransformersEngine  # type: ignore[import-not-found]

    root = tmp_path_factory.mktemp("models")
    models = make_contract_models(root)
    models["config"] = models["qwen3"]
    engine: Any = OneRank(TransformersEngine(models["qwen3"], max_model_len=96))
    with pytest.raises(RuntimeError, match="before the weights are complete"):
        engine.call(contract.generate, contract.PROMPTS, contract.SAMPLING)
    available = {"engine": engine, "models": models, "temperature": 0.7}
    for test in contract_tests():
        if test is contract.test_gauges_describe_the_requests_since_the_last_call:
            continue  # this engine measures nothing, and says so
        engine.call(contract.push, models["qwen3"], 0)
        test(**{name: available[name] for name in inspect.signature(test).parameters})
    assert len(contract_tests()) >= 10
    assert engine.call(lambda session: session.engine.take_gauges())[0] == EngineGauges()


def test_every_guide_is_listed_and_every_python_block_has_a_name() -> None:
    index = (REPOSITORY / "docs" / "guides" / "index.md").read_text(encoding="utf-8")
    for guide in GUIDES:
        assert guide.name == "index.md" or f"]({guide.name})" in index
        text = guide.read_text(encoding="utf-8")
        assert text.count("```python\n") == len(python_blocks(f"guides/{guide.name}")), guide.name
