"""`grpo-mega`: every subcommand is found, describes itself, and rejects a mistyped name with the nearest one."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest

from grpo_mega import __version__
from grpo_mega.cli import compare, convert, report, train
from grpo_mega.cli.environment import PROCESS_ENVIRONMENT
from grpo_mega.cli.main import COMMANDS, main
from grpo_mega.config.shipped import find_config, shipped_config_names, shipped_model_folder
from grpo_mega.observe.summary import Evaluation, Summary, write_summary
from tests.helpers.jobs import REPOSITORY

EVERY_COMMAND = [COMMANDS, convert.DIRECTIONS, compare.COMPARISONS]


def test_help_names_every_command_and_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if f"  {name} " not in shown] == []
    assert main([]) == 2
    assert "a command is missing" in capsys.readouterr().err


def test_version_prints_the_version_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("module", sorted({c.module for commands in EVERY_COMMAND for c in commands.values()}))
def test_every_command_has_a_module_with_a_main(module: str) -> None:
    assert callable(importlib.import_module(f"grpo_mega.cli.{module}").main)


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [(["plna"], "plan"), (["convert", "to_hf"], "to-hf"), (["compare", "logit"], "logits"), (["doctr"], "doctor")],
)
def test_a_mistyped_command_is_exit_code_2_and_names_the_nearest(
    arguments: list[str], nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert f"did you mean {nearest}?" in capsys.readouterr().err


def test_every_tool_of_the_repository_is_a_thin_caller_of_the_same_function() -> None:
    thin = [path for path in (REPOSITORY / "tools").glob("*.py") if "from grpo_mega.cli." in path.read_text()]
    modules = {path.stem for path in thin if "sys.exit(main())" in path.read_text()}
    commands = {c.module for commands in EVERY_COMMAND for c in commands.values()}
    assert modules >= commands - {"train", "serve", "configs", "convert", "compare", "replay", "report", "trace"}


def test_the_environment_equals_that_of_the_launch_scripts() -> None:
    script = (REPOSITORY / "launch" / "env.sh").read_text()
    assert dict(re.findall(r'^export (\w+)="\$\{\w+:-([^}]*)\}"$', script, re.MULTILINE)) == PROCESS_ENVIRONMENT


def test_shipped_configs_are_found_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = shipped_config_names()
    assert {"quickstart", "recipes/dapo-32b"} <= set(names)
    assert find_config(Path("quickstart")) == find_config(Path("configs/quickstart.yaml"))
    assert all(find_config(Path(name)).is_file() for name in names)
    assert find_config(Path("nothing.yaml")) == Path("nothing.yaml")
    assert find_config(Path("configs")) == Path("configs")
    assert (shipped_model_folder(Path("Qwen/Qwen2.5-7B-Instruct")) / "config.json").is_file()
    (tmp_path / "quickstart").write_text("")
    assert find_config(Path("quickstart")) == Path("quickstart")


def test_configs_prints_one_and_rejects_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "quickstart"]) == 0
    assert capsys.readouterr().out == (REPOSITORY / "configs" / "quickstart.yaml").read_text()
    assert main(["configs", "nothing"]) == 2


def test_train_without_a_config_starts_the_launcher_with_the_quickstart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(train, "launch", lambda argv: seen.append(list(argv)) or 0)
    assert main(["train"]) == 0
    assert main(["train", "train.steps=2"]) == 0
    assert main(["train", "a.yaml", "train.steps=2"]) == 0
    assert [argv[1:] for argv in seen] == [
        ["quickstart"],
        ["quickstart", "train.steps=2"],
        ["a.yaml", "train.steps=2"],
    ]
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert {Path(argv[0]).name for argv in seen} <= set(scripts)


def test_report_prints_a_summary_and_rejects_a_folder_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = Evaluation(0.5, 0.5, 3.0, 10), Evaluation(0.75, 0.7, 4.0, 10)
    write_summary(tmp_path / "summary.json", Summary("done", 7, before, after))
    assert report.main([str(tmp_path)]) == 0
    assert "0.50 -> 0.75 (+0.25)" in capsys.readouterr().out
    assert report.main([str(tmp_path / "nothing")]) == 2
    assert "was not found" in capsys.readouterr().err
