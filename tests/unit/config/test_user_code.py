"""A function of the user is found in the working directory, beside the config and among the installed packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_mega.config.load import load_config, resolved
from grpo_mega.config.user_code import absolute_name, import_file
from grpo_mega.rewards.base import build_rewards
from grpo_mega.types import UserError

MINIMAL: dict[str, Any] = {
    "model": {"base": {"task": "arithmetic"}},
    "data": {"train": "arithmetic:train"},
    "train": {"steps": 3},
}
REWARD = "def half(prompt, completion, reference):\n    return 0.5\n"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return the working directory and the folder of the config."""
    work, beside = tmp_path / "work", tmp_path / "beside"
    work.mkdir()
    beside.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return work, beside


@pytest.mark.parametrize("name", ["./own_code.py:half", "own_code.py:half", "own_code:half", "own_code.half"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_file_in_either_folder_gets_its_absolute_path(folders: tuple[Path, Path], name: str, place: int) -> None:
    file = folders[place] / "own_code.py"
    file.write_text(REWARD)
    assert absolute_name("key", name, folders) == f"{file}:half"
    assert absolute_name("key", f"{file}:half", [Path("/")]) == f"{file}:half"


@pytest.mark.parametrize("name", ["./own_code.py:half", "own_code:half"])
def test_two_different_files_are_rejected_and_both_are_named(folders: tuple[Path, Path], name: str) -> None:
    for folder in folders:
        (folder / "own_code.py").write_text(REWARD)
    with pytest.raises(UserError) as caught:
        absolute_name("reward.terms[0].name", name, folders)
    parts = ["reward.terms[0].name", "is ambiguous", *(str(folder / "own_code.py") for folder in folders)]
    assert [part for part in parts if part not in str(caught.value)] == []
    (folders[1] / "own_code.py").unlink()
    (folders[1] / "own_code.py").symlink_to(folders[0] / "own_code.py")
    assert absolute_name("key", name, folders) == f"{folders[0] / 'own_code.py'}:half"


def test_a_file_that_hides_an_installed_module_is_rejected(folders: tuple[Path, Path]) -> None:
    (folders[0] / "yaml.py").write_text(REWARD)
    with pytest.raises(UserError, match=r"is ambiguous: it names .*work/yaml\.py and .*yaml/__init__\.py"):
        absolute_name("key", "yaml:half", folders)
    assert absolute_name("key", "./yaml.py:half", folders).endswith("work/yaml.py:half")


def test_a_file_that_is_nowhere_is_named_with_both_places(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UserError) as caught:
        absolute_name("environment.name", "./gone.py:f", folders)
    assert all(f"{folder}/gone.py" in str(caught.value) for folder in folders)


@pytest.mark.parametrize("name", ["math", "json:loads", "grpo_mega.rewards.builtin.exact:exact"])
def test_other_names_stay_as_they_are(folders: tuple[Path, Path], name: str) -> None:
    assert absolute_name("key", name, folders) == name


def test_a_package_keeps_its_relative_imports_and_needs_an_init_file(folders: tuple[Path, Path]) -> None:
    package = folders[1] / "own_package" / "inner"
    package.mkdir(parents=True)
    (package / "grade.py").write_text("from .. import limits\ndef half(p, c, r):\n    return limits.HALF\n")
    (package.parent / "limits.py").write_text("HALF = 0.5\n")
    with pytest.raises(UserError, match=r"inner is not a package.*add an empty .*inner/__init__\.py"):
        absolute_name("key", "own_package.inner.grade:half", folders)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    name = absolute_name("key", "own_package.inner.grade:half", folders)
    assert name == f"{package / 'grade.py'}:half"
    assert import_file(package / "grade.py").half("", "", "") == 0.5


def test_a_file_imports_its_neighbor_and_may_define_dataclasses(folders: tuple[Path, Path]) -> None:
    (folders[1] / "own_neighbor.py").write_text("HALF = 0.5\n")
    (folders[1] / "json.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from own_neighbor import HALF\n"
        "@dataclass\nclass Limits:\n    top: ClassVar[float] = HALF\n"
        "def half(prompt, completion, reference):\n    return Limits.top\n"
    )
    module = import_file(folders[1] / "json.py")
    assert module.half("", "", "") == 0.5
    assert import_file(folders[1] / "json.py") is module
    import json

    assert json.loads("1") == 1


def test_the_config_of_a_run_finds_its_functions_from_another_working_directory(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, beside = folders
    (beside / "own_code.py").write_text(
        "def half(prompt, completion, reference):\n    return 0.5\n"
        "def replies(prompt, turns, reference):\n    return None\n"
        "def plain(log_probs, log_ratio, advantages, segments):\n    return log_ratio * advantages, advantages > 0\n"
        "def rewards(step):\n    return step\n"
    )
    values = MINIMAL | {
        "reward": {"terms": [{"name": "./own_code.py:half"}]},
        "environment": {"name": "own_code:replies", "stop": ["="]},
        "algorithm": {
            "surrogate": "own_code.plain",
            "advantage": "./own_code.py:rewards",
            "clip_low": None,
            "clip_high": None,
        },
    }
    (beside / "run.yaml").write_text(yaml.safe_dump(values))
    config = load_config(beside / "run.yaml")
    stored = work / "config.yaml"
    stored.write_text(yaml.safe_dump(resolved(config)))
    monkeypatch.chdir("/")
    again = load_config(stored)
    assert again == config
    file = f"{beside / 'own_code.py'}:"
    names = [again.reward.terms[0].name, again.environment and again.environment.name]
    assert [*names, again.algorithm.surrogate, again.algorithm.advantage] == [
        file + name for name in ("half", "replies", "plain", "rewards")
    ]
    assert build_rewards(again.reward.terms)[0]("", "", "") == 0.5


@pytest.mark.parametrize("tool", [["-m", "grpo_mega.cli.main", "score"], ["tools/score.py"]])
def test_score_finds_a_reward_by_module_and_by_file(folders: tuple[Path, Path], tool: list[str]) -> None:
    work = folders[0]
    (work / "own_code.py").write_text(REWARD)
    (work / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "answer": "b"}\n')
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, *(str(root / part) if part.endswith(".py") else part for part in tool)]
    for name in ("own_code:half", "./own_code.py:half"):
        done = subprocess.run(
            [*command, "--reward", name, "--workers", "1", "rows.jsonl"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert '"reward": 0.5' in done.stdout
