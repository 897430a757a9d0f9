"""Names of the hub, and the folders of its cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mega.config.hub_names import hub_cache, is_hub_name, is_offline


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B-Instruct", "openai/gsm8k", "a/b", "meta-llama/Llama-3.3_70B"])
def test_organization_and_name_are_a_hub_name(name: str) -> None:
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "path",
    ["gsm8k", "/a/b", "./a/b", "../b", "~/a", "a/b/c", "a/train.jsonl", "a/b.parquet", "models/Qwen3-8B", "data/a",
     "runs/base", "a/", "a--b/c", "arithmetic:train", "a b/c", ""],
)  # fmt: skip
def test_a_path_is_no_hub_name(path: str) -> None:
    assert not is_hub_name(path)


def test_a_name_of_an_existing_folder_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("lab/model")
    (tmp_path / "lab" / "model").mkdir(parents=True)
    assert not is_hub_name("lab/model")


def test_the_cache_is_that_of_huggingface_hub() -> None:
    program = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"  # read at the import
    for env in ({"HF_HOME": "/h"}, {"HF_HOME": "/h", "HF_HUB_CACHE": "/c"}, {"XDG_CACHE_HOME": "/x"}):
        printed = subprocess.run(
            [sys.executable, "-c", program], env={"HOME": "/home", **env}, capture_output=True, text=True, check=True
        )
        assert printed.stdout.strip() == str(hub_cache(env))


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ({"HF_HOME": "/h"}, "/h/hub"),
        ({"HF_HOME": "/h", "HF_HUB_CACHE": "/c"}, "/c"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
    ],
)
def test_the_variables_of_the_cache(env: dict[str, str], folder: str) -> None:
    assert hub_cache(env) == Path(folder)


def test_offline_is_read_as_huggingface_hub_reads_it() -> None:
    assert is_offline({"HF_HUB_OFFLINE": "1"})
    assert is_offline({"TRANSFORMERS_OFFLINE": "yes"})
    assert not is_offline({"HF_HUB_OFFLINE": "0"})
