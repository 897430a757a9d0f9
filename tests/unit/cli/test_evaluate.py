"""tools/evaluate.py builds a config from its arguments and rejects wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_mega.cli import evaluate
from grpo_mega.observe.summary import Summary, write_summary
from tests.helpers.tiny_models import make_tiny_model

DATA = ("--data", "arithmetic:heldout")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("evaluate") / "model", "qwen3")


def make_run(folder: Path, model: Path, **sections: Any) -> Path:
    values: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"train": "gone.jsonl", "template": "plain", "max_prompt_tokens": 16},
        "sampling": {"max_tokens": 8},
        "reward": {"terms": [{"name": "exact"}, {"name": "format"}]},
        "train": {"steps": 9},
        "evaluation": {"temperature": 0.7, "k": 2},
        "engine": {"tp": 2},
        "parallel": {"pp": 4},
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(values | sections))
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert evaluate.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", *DATA), "CHECKPOINT=nowhere must be a folder"),
        (("{model}", *DATA, "--k", "0"), "evaluation.k=0"),
        (("{model}", *DATA, "--k", "8", "--samples", "4"), "evaluation.report_k=[8] must hold"),
        (("{model}", *DATA, "--temperature", "0"), "evaluation.temperature=0"),
        (("{model}", *DATA, "--reward", "exakt"), "did you mean 'exact'"),
        (("{model}", *DATA, "data.tmplate=plain"), "did you mean data.template"),
        (("{model}", *DATA, "--max-tokens", "100000"), "more than the"),
    ],
)
def test_each_wrong_argument_has_its_own_error(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    error = error_of(capsys, *(a.format(model=model) for a in arguments))
    assert message in error
    assert "Traceback" not in error


def test_a_run_without_a_checkpoint_is_rejected(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", model)
    assert "the run has no complete checkpoint" in error_of(capsys, str(run), *DATA)
    (run / "checkpoints" / "step_000001").mkdir(parents=True)
    (run / "config.yaml").write_text("model: 3")
    assert "must be the config of a run" in error_of(capsys, str(run / "checkpoints" / "step_000001"), *DATA)


def config_of(*arguments: str) -> tuple[Any, evaluate.Checkpoint]:
    args = evaluate.parse_arguments(arguments)
    checkpoint = evaluate.find_checkpoint(args.checkpoint, args.reward, args.data)
    return evaluate.config_of(args, checkpoint), checkpoint


def test_a_checkpoint_of_a_run_is_evaluated_with_the_settings_of_the_run(model: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", model) / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    config, checkpoint = config_of(str(folder), *DATA, "--data", "/b.jsonl", "--k", "1", "4")
    assert (checkpoint.weights, checkpoint.model) == (folder, model)
    assert (config.evaluation.temperature, config.evaluation.k, config.evaluation.report_k) == (0.7, 4, (1, 4))
    assert [source.path for source in config.data.eval_sets] == ["arithmetic:heldout", "/b.jsonl"]
    assert (config.run.world_size, config.engine.tp, config.parallel.pp) == (2, 2, 1)
    assert [term.name for term in config.reward.terms] == ["exact", "format"]
    (folder / "complete").touch()
    newest, run = config_of(str(tmp_path / "run"), *DATA, "--samples", "16", "--reward", "gsm8k", "run.world_size=4")
    assert run.weights == folder
    assert (newest.evaluation.k, newest.evaluation.report_k, newest.run.world_size) == (16, None, 4)
    assert [term.name for term in newest.reward.terms] == ["gsm8k"]


def test_the_settings_of_the_run_are_the_default_and_a_change_is_named(model: Path, tmp_path: Path) -> None:
    data = {"train": "gone.jsonl", "eval": "arithmetic:heldout", "template": "plain", "max_prompt_tokens": 16}
    evaluation = {"temperature": 0.7, "k": 2, "report_k": [1, 2], "max_prompts": 7, "every": 3}
    run = make_run(tmp_path / "run", model, data=data, evaluation=evaluation, run={"seed": 5, "world_size": None})
    layout = {"world_size": 8, "engine_replicas": 4}
    write_summary(run / "summary.json", Summary("done", 9, layout=layout))
    folder = run / "checkpoints" / "step_000009"
    folder.mkdir(parents=True)
    config, checkpoint = config_of(str(folder))
    assert (config.run.seed, config.run.world_size, config.engine.tp) == (5, 8, 2)
    assert config.data.eval == "arithmetic:heldout"
    limits = config.evaluation
    assert (limits.temperature, limits.k, limits.report_k, limits.max_prompts) == (0.7, 2, (1, 2), 7)
    assert evaluate.differences(config, checkpoint) == []
    same = ("--data", "arithmetic:heldout", "--seed", "5", "--k", "1", "2", "--temperature", "0.7")
    assert evaluate.differences(*config_of(str(folder), *same)) == []
    changed = ("--seed", "6", "--k", "4", "--max-prompts", "3", "--reward", "exact", "run.world_size=2")
    assert evaluate.differences(*config_of(str(folder), *changed, "--data", "/b.jsonl")) == [
        "run.seed=6 (run: 5)",
        "run.world_size=2 (run: 8)",
        "data.eval=[{'path': '/b.jsonl'}] (run: [{'path': 'arithmetic:heldout'}])",
        "reward.terms=[{'name': 'exact'}] (run: [{'name': 'exact'}, {'name': 'format'}])",
        "evaluation.k=4 (run: 2)",
        "evaluation.report_k=[4] (run: [1, 2])",
        "evaluation.max_prompts=3 (run: 7)",
    ]


def test_more_ranks_than_gpus_are_rejected_with_the_number_to_use(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", model) / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    monkeypatch.setattr(evaluate, "num_visible_gpus", lambda env: 5)
    error = error_of(capsys, str(folder), *DATA, "run.world_size=8")
    assert "run.world_size=8" in error
    assert "add run.world_size=4" in error


def test_without_held_out_prompts_the_option_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", model) / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    assert "data.eval=null" in error_of(capsys, str(folder))
    assert "give --data FILE" in error_of(capsys, str(model))


def test_a_set_may_be_named_so_that_the_rewards_of_its_name_apply(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = {"terms": [{"name": "exact", "datasets": ["sums"]}, {"name": "gsm8k", "datasets": ["stories"]}]}
    data = {"train": [{"path": "a.jsonl", "name": "sums"}, {"path": "/b.jsonl", "name": "stories"}],
            "template": "plain", "max_prompt_tokens": 16}  # fmt: skip
    folder = make_run(tmp_path / "run", model, reward=reward, data=data) / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    config, _ = config_of(str(folder), "--data", "sums=arithmetic:heldout")
    assert [(source.label, source.path) for source in config.data.eval_sets] == [("sums", "arithmetic:heldout")]
    assert "'arithmetic_heldout' has no reward" in error_of(capsys, str(folder), *DATA)
    (tmp_path / "a=b.jsonl").touch()
    assert evaluate.data_source(str(tmp_path / "a=b.jsonl")) == {"path": str(tmp_path / "a=b.jsonl")}


def test_a_run_with_servers_is_evaluated_without_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = {"placement": "server", "urls": ["gone:7"], "tp": 2}
    folder = make_run(tmp_path / "run", model, engine=engine) / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    config, _ = config_of(str(folder), *DATA)
    assert (config.engine.placement, config.engine.tp, config.run.world_size) == ("colocated", 2, 2)
    server_keys = "engine.placement=server", "engine.urls=['here:7']"
    assert "engine.placement=server is not supported" in error_of(capsys, str(folder), *DATA, *server_keys)
