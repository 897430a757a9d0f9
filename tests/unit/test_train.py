"""Command line of the worker: number of ranks, and one message with exit code 2 for wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from grpo_mega import train
from grpo_mega.config.load import load_config
from grpo_mega.data.tokenizers import byte_tokenizer
from grpo_mega.parallel.device_queues import VARIABLE
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"
SECONDS = 10.0


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "NNODES", "SLURM_PROCID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def wanted_world_size(*overrides: str) -> int:
    return train.wanted_world_size(load_config(QUICKSTART, overrides))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bogus"], ["--bogus is not an option of grpo_mega.train", "--help"]),
        (["--hepl"], ["--hepl", "did you mean --help?"]),
        ([str(QUICKSTART), "--train.steps=3"], ["--train.steps", "did you mean the override train.steps=3?"]),
        (
            [str(QUICKSTART), "--group-size", "8"],
            ["--group-size", "did you mean the override sampling.group_size=VALUE?"],
        ),
    ],
)
def test_an_unknown_option_is_named_before_a_missing_argument(
    arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["grpo_mega.train", *arguments])
    with pytest.raises(SystemExit) as caught:
        train.main()
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert message.count("\n") == 1
    assert [word for word in words if word not in message] == [], message


def test_the_world_size_of_the_config_has_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNODES", "3")
    assert wanted_world_size("run.world_size=4") == 4
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert wanted_world_size("run.world_size=4") == 4


def test_the_world_size_of_the_launcher_is_used_if_the_config_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert wanted_world_size() == 6


def test_a_launcher_with_another_number_of_ranks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as caught:
        wanted_world_size("run.world_size=4")
    assert_names(caught.value, "run.world_size=4", "2 ranks", "leave run.world_size out")


def test_world_size_inside_a_slurm_step_is_its_tasks_or_a_rank_for_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "num_visible_gpus", lambda env: 4)
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NNODES": "2"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_NTASKS", "6")
    assert wanted_world_size() == 6
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert wanted_world_size() == 8  # an agent on each node, which starts a rank for each of its devices


@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="counts the GPUs of this machine")
def test_world_size_without_gpus_is_one_for_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted_world_size() == 1
    monkeypatch.setenv("NNODES", "3")
    assert wanted_world_size() == 3


def run_train(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grpo_mega.train", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


START_ON_A_GPU = """
import os, sys
from pathlib import Path
from grpo_mega.parallel import devices
devices.DRIVER_FOLDER = Path(sys.argv[1])  # of a machine whose driver lists one GPU
from grpo_mega import train
from grpo_mega.types import UserError

def prepare(config):
    raise UserError(f"{os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS')} {'torch' in sys.modules}", remedy="none")

train.prepare = prepare
sys.argv[1:] = sys.argv[2:]
train.main()
"""


@pytest.mark.parametrize(
    ("layout", "found", "result"),
    [("parallel.tp=2", {}, "1"), ("parallel.pp=2", {}, "None"), ("parallel.tp=2", {VARIABLE: "8"}, "8")],
)
def test_a_rank_sets_the_queues_of_its_layout_before_torch_is_imported(
    layout: str, found: dict[str, str], result: str, tmp_path: Path
) -> None:
    (tmp_path / "gpus" / "0000:00:00.0").mkdir(parents=True)
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", START_ON_A_GPU, str(tmp_path / "gpus"), str(QUICKSTART), layout, "run.world_size=2"],
        env={**environment, "PYTHONPATH": str(REPOSITORY), "RANK": "0", "WORLD_SIZE": "2", **found},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert f"error: {result} False" in done.stderr
    assert ("CUDA_DEVICE_MAX_CONNECTIONS=8: with parallel.tp=2" in done.stderr) == (result == "8")


def test_for_launcher_prints_the_values_of_the_config() -> None:
    done = run_train(QUICKSTART, "run.world_size=8", "parallel.tp=2", "guard.timeout_seconds=60", "--for-launcher")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "world_size": 8,
        "configured": True,
        "timeout_seconds": 60.0,
        "phase_limits": {},
        "resume": "auto",
        "overrides": [],
    }


def test_a_wrong_key_and_a_malformed_line_end_a_process_with_one_message(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "1+1=", "answer": "2"}\n\n{"prompt": "1+2=", "answer": \n')
    for override, message in (
        ("parallel.tpp=2", "error: parallel.tpp: unknown key; did you mean parallel.tp?\n"),
        (
            f"data.train={questions}",
            f"error: {questions}:3: not valid JSON (Expecting value: line 2 column 1 (char 30)); write one JSON object "
            "per line\n",
        ),
    ):
        done = run_train(QUICKSTART, override)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def exit_of_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *overrides: str
) -> tuple[Any, str]:
    """Return exit code and stderr of `main`, which must fail before the first process group."""

    def reached(_: train.Prepared, __: object) -> NoReturn:
        pytest.fail("the input was found to be right")

    monkeypatch.setattr(train, "run_worker", reached)
    monkeypatch.setattr(train, "StopRequests", object)  # the handlers of the test's own process stay
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # `main` sets it when it is unset
    monkeypatch.setattr(sys, "argv", ["grpo_mega.train", str(QUICKSTART), *overrides])
    with pytest.raises(SystemExit) as caught:
        train.main()
    return caught.value.code, capsys.readouterr().err


def write_model(folder: Path, **files: str) -> Path:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 10,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)
    return folder


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.steps=many"], ("train.steps='many'", "valid integer")),
        (["engine.fp8=own_loader"], ("engine.fp8='own_loader'", "'scales_fp32' or 'scales_power_of_two'")),
        (["sampling.group_size=1"], ("sampling.group_size=1", "use 2 or more")),
        (
            ["parallel.tp=2"],
            ("run.world_size=1", "parallel.tp x parallel.cp x parallel.pp = 2 x 1 x 1", "use a multiple of 2"),
        ),
        (
            ["parallel.tp=4", "run.world_size=4"],
            ("parallel.tp=4", "does not divide the 2 key-value heads of model.base.architecture", "use one of 1, 2"),
        ),
        (["data.train=/none/rows.jsonl"], ("data.train=/none/rows.jsonl", "arithmetic:train / arithmetic:heldout")),
        (["data.eval=/none/rows.jsonl"], ("data.eval=/none/rows.jsonl", "arithmetic:train / arithmetic:heldout")),
        (
            ["data.template=chat", "data.chat_template=/none.jinja"],
            ("data.chat_template=/none.jinja", "cannot be read", "name a readable file"),
        ),
        (["data.chat_template_kwargs=thinking"], ("data.chat_template_kwargs='thinking'", "valid dictionary")),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], overrides: list[str], parts: tuple[str, ...]
) -> None:
    # where there are GPUs, a config that names no world size would want as many
    monkeypatch.setattr(train, "wanted_world_size", lambda config: config.run.world_size or 1)
    code, message = exit_of_main(monkeypatch, capsys, *overrides)
    assert code == 2
    assert message.startswith(f"error: {parts[0]}")
    assert message.count("\n") == 1
    assert [part for part in parts if part not in message] == []


def test_a_prompt_longer_than_the_limit_is_named_with_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "10+10=", "answer": "20"}\n')
    code, message = exit_of_main(
        monkeypatch, capsys, f"data.train={questions}", "data.max_prompt_tokens=5", "run.world_size=1"
    )
    assert code == 2
    assert message.startswith(f"error: {questions}:2: ")
    assert "data.max_prompt_tokens=5" in message
    assert "data.overlong=skip" in message
    assert message.count("\n") == 1


def test_a_model_folder_without_a_usable_tokenizer_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    larger = {"tokenizer": byte_tokenizer().backend_tokenizer.to_str(), "tokenizer_config": '{"eos_token": "<eos>"}'}
    for name, files, rule in (
        ("bare", {}, "contains no tokenizer (none of tokenizer.json, "),
        ("damaged", {"tokenizer": "{"}, "its tokenizer cannot be read ("),
        (
            "larger",
            larger,
            ": 248 tokens of the tokenizer are not in the model's vocabulary, which has vocab_size=10: ",
        ),
    ):
        folder = write_model(tmp_path / name, **files)
        code, message = exit_of_main(monkeypatch, capsys, "model.base=null", f"model.path={folder}", "run.world_size=1")
        assert code == 2
        assert message.startswith(f"error: model.path={folder}")
        assert rule in message
        assert message.count("\n") == 1


def test_an_unknown_reward_is_an_error_before_prompts_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["reward.terms=[{name: exakt}]", "data.train=nothing.jsonl", "run.world_size=1"]
    code, message = exit_of_main(monkeypatch, capsys, *overrides)
    assert code == 2
    assert message.startswith("error: reward.terms")
    assert "exakt" in message


def test_preparing_valid_input_returns_its_prompts_and_writes_nothing(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, ["run.world_size=4", "parallel.tp=2", "engine.tp=2"])
    prepared = train.prepare(config)
    assert (prepared.topology.dp, prepared.topology.num_replicas) == (2, 2)
    assert prepared.eval_prompts is not None
    assert len(prepared.eval_prompts) >= 300
    assert not {p.text for p in prepared.eval_prompts.prompts} & {p.text for p in prepared.train_prompts.prompts}
    assert list(tmp_path.iterdir()) == []
