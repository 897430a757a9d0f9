"""Relative paths of a config become absolute, so that a resolved config means the same in every folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_mega.config.absolute_paths import with_absolute_paths
from grpo_mega.config.load import load_config, resolved
from grpo_mega.observe.config_changes import compare_configs
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names

MINIMAL: dict[str, Any] = {"reward": {"terms": [{"name": "exact"}]}, "train": {"steps": 3}}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return the working directory and the folder of the config."""
    work, beside = tmp_path / "work", tmp_path / "beside"
    work.mkdir()
    beside.mkdir()
    monkeypatch.chdir(work)
    return work, beside


def write_config(folder: Path, **sections: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | sections))
    return path


@pytest.mark.parametrize("place", [0, 1])
def test_files_in_either_folder_get_their_absolute_paths(folders: tuple[Path, Path], place: int) -> None:
    for name in ("rows.jsonl", "held.jsonl", "chat.jinja"):
        (folders[place] / name).write_text("")
    (folders[place] / "model").mkdir()
    (folders[place] / "checkpoints" / "step_000200").mkdir(parents=True)
    config = load_config(
        write_config(
            folders[1],
            model={"path": "model", "checkpoint": "checkpoints/step_000200"},
            data={"train": [{"path": "rows.jsonl"}], "eval": "held.jsonl", "chat_template": "chat.jinja"},
        )
    )
    found = [config.model.path, config.data.train_sets[0].path, config.data.eval, config.data.chat_template]
    assert found == [str(folders[place] / name) for name in ("model", "rows.jsonl", "held.jsonl", "chat.jinja")]
    assert config.model.checkpoint == str(folders[place] / "checkpoints" / "step_000200")


def test_a_checkpoint_that_does_not_exist_is_no_name_on_the_hub(folders: tuple[Path, Path]) -> None:
    model = {"path": "lab/model", "checkpoint": "checkpoints/step_000200"}
    config = load_config(write_config(folders[1], model=model, data={"train": "lab/rows"}))
    assert config.model.checkpoint == str(folders[0] / "checkpoints" / "step_000200")


def test_a_tiny_base_gets_absolute_paths_of_its_examples_and_its_cache(folders: tuple[Path, Path]) -> None:
    (folders[1] / "rows.jsonl").write_text("")
    base = {"task": "gsm8k", "tokenizer": "byte", "examples": "rows.jsonl"}
    config = load_config(write_config(folders[1], model={"base": base}, data={"train": "arithmetic:train"}))
    assert config.model.base is not None
    assert config.model.base.examples == str(folders[1] / "rows.jsonl")
    assert config.model.base.cache_dir == str(folders[0] / "runs" / "bases")
    assert config.data.train == "arithmetic:train"


def test_two_files_of_one_name_are_an_error(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        (folder / "rows.jsonl").write_text("")
    with pytest.raises(UserError) as caught:
        load_config(write_config(folders[1], model={"path": "/model"}, data={"train": "rows.jsonl"}))
    assert_names(caught.value, "data.train='rows.jsonl'", str(folders[0]), str(folders[1]), "absolute path")


def test_names_of_the_hub_stay_as_they_are(folders: tuple[Path, Path]) -> None:
    config = load_config(write_config(folders[1], model={"path": "lab/model"}, data={"train": "lab/rows"}))
    assert (config.model.path, config.data.train) == ("lab/model", "lab/rows")
    assert config.model.is_on_hub


def test_a_resolved_config_is_the_same_config_in_another_folder(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folders[0] / "rows.jsonl").write_text("")
    (folders[0] / "model").mkdir()
    config = load_config(write_config(folders[1], model={"path": "model"}, data={"train": "rows.jsonl"}))
    stored = folders[0] / "config.yaml"
    stored.write_text(yaml.safe_dump(resolved(config)))
    monkeypatch.chdir(folders[1])
    assert load_config(stored) == config


def test_a_run_of_an_earlier_version_with_relative_paths_continues(folders: tuple[Path, Path]) -> None:
    (folders[0] / "rows.jsonl").write_text("")
    model = {"path": "model"}
    now = resolved(load_config(write_config(folders[1], model=model, data={"train": "rows.jsonl"})))
    earlier = now | {"model": model, "data": now["data"] | {"train": "rows.jsonl"}}
    assert compare_configs(earlier, now).frozen == ()
    other = earlier | {"data": now["data"] | {"train": "others.jsonl"}}
    assert [change.key for change in compare_configs(other, now).frozen] == ["data.train"]


def test_a_set_that_was_stored_before_it_had_the_keys_of_the_hub_is_the_same_set(folders: tuple[Path, Path]) -> None:
    (folders[0] / "rows.jsonl").write_text("")
    config = write_config(folders[1], model={"path": "/model"}, data={"train": [{"path": "rows.jsonl"}]})
    now = resolved(load_config(config))
    (source,) = now["data"]["train"]
    older = {name: value for name, value in source.items() if name not in ("config", "revision")}
    earlier = now | {"data": now["data"] | {"train": [older]}}
    assert compare_configs(earlier, now).frozen == ()


@pytest.mark.parametrize("values", [{}, {"model": 1, "data": "x"}, {"data": {"train": 3, "eval": [1, {"path": 2}]}}])
def test_values_of_a_wrong_type_stay_for_the_check_of_the_config(values: dict[str, Any]) -> None:
    assert with_absolute_paths(values, [Path.cwd()]) == values
