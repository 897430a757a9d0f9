"""The files and commands of docs/first-own-run.md, and a run whose model and rows are named on a hub."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.helpers.guides import python_blocks, shell_blocks, yaml_blocks
from tests.helpers.hub_server import TOKEN, environment_of, files_of, hub_server
from tests.helpers.jobs import REPOSITORY, TRAIN, clean_environment, read_json, read_lines
from tests.helpers.tiny_models import make_tiny_model

GUIDE = "first-own-run.md"
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
---
"""


def write_guide(folder: Path) -> list[str]:
    """Write the files of the guide and its rows; return its other shell blocks."""
    for name, text in {**python_blocks(GUIDE), **yaml_blocks(GUIDE)}.items():
        (folder / name).write_text(text)
    rows, *others = shell_blocks(GUIDE)
    subprocess.run(["bash", "-euo", "pipefail", "-c", rows], cwd=folder, check=True)
    return others


def run(folder: Path, *command: str, seconds: float = 300.0, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=folder,
        env={**clean_environment(), "PATH": path, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def test_the_guide_has_25_lines_of_yaml_and_5_of_python() -> None:
    assert len(yaml_blocks(GUIDE)["own_run.yaml"].splitlines()) <= 25
    assert len(python_blocks(GUIDE)["own_reward.py"].splitlines()) == 5


def test_the_run_of_the_guide_trains_and_its_evaluation_repeats_in_another_folder(tmp_path: Path) -> None:
    write_guide(tmp_path)
    small = ("model.base.steps=20", "train.steps=1", "data.prompts_per_step=8", "train.minibatches_per_epoch=1")
    done = run(tmp_path, str(TRAIN), "own_run.yaml", *small, "evaluation.k=1")
    assert done.returncode == 0, done.stderr[-3000:]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    tool = str(REPOSITORY / "tools" / "evaluate.py")
    again = run(elsewhere, sys.executable, tool, str(tmp_path / "runs" / "own_run"), "--json")
    assert again.returncode == 0, again.stderr[-3000:]
    found = json.loads(again.stdout.splitlines()[-1])
    expected = read_json(tmp_path / "runs" / "own_run" / "summary.json")["eval_after"]
    assert {name: found[name] for name in expected if name in found} == {n: expected[n] for n in expected if n in found}
    assert "not the same evaluation" not in again.stderr
    assert not (elsewhere / "runs").exists()  # the tiny base is not made again


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_commands_of_the_guide_show_that_the_model_learns(tmp_path: Path) -> None:
    (block,) = write_guide(tmp_path)
    done = run(
        tmp_path, "bash", "-euo", "pipefail", "-c", block.replace("launch/", f"{REPOSITORY}/launch/"), seconds=800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = read_json(tmp_path / "runs" / "own_run" / "summary.json")
    assert summary["eval_after"]["reward_mean"] >= summary["eval_before"]["reward_mean"] + 0.1


def parquet(*numbers: int) -> bytes:
    file = io.BytesIO()
    rows = [{"question": f"{n} boxes of 3", "answer": f"{n}*3={n * 3} #### {n * 3}"} for n in numbers]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.mark.long  # tests/unit/data/hub has the same steps in one process
def test_a_run_by_name_downloads_once_and_continues_with_its_commits(tmp_path: Path) -> None:
    """Two ranks; after the first step the branches have moved. The model is gated: the token opens it."""
    write_guide(tmp_path)
    small: tuple[str, ...] = (
        "run.world_size=2", "data.template=plain", "data.prompts_per_step=4", "data.max_prompt_tokens=32",
        "sampling.group_size=2", "sampling.max_tokens=4", "evaluation.k=1", "precision.dtype=fp32",
    )  # fmt: skip
    data: dict[str, bytes | None] = {
        "README.md": CARD.encode(),
        "main/train-0.parquet": parquet(*range(2, 22)),
        "main/test-0.parquet": parquet(30, 31),
    }
    with hub_server() as server:
        files = files_of(make_tiny_model(tmp_path / "made", vocab=72))
        model = server.add("models/Qwen/Qwen2.5-0.5B-Instruct", files, gated=True)
        rows = server.add("datasets/openai/gsm8k", data)
        env = environment_of(server, tmp_path / "cache") | {"HF_TOKEN": TOKEN}
        commits = (model.branches["main"], rows.branches["main"])
        done = run(tmp_path, str(TRAIN), "by_name.yaml", *small, "train.steps=1", **env)
        assert done.returncode == 0, done.stderr[-3000:]
        downloads = server.downloads()
        assert len(downloads) == len(set(downloads)) >= 6
        model.commit({"config.json": b"{}"})
        rows.commit({"README.md": b""})
        again = run(tmp_path, str(TRAIN), "by_name.yaml", *small, "train.steps=2", **env)
        assert again.returncode == 0, again.stderr[-3000:]
        assert server.downloads() == downloads
    folder = tmp_path / "runs" / "by_name"
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["model"]["path"], config["model"]["revision"]) == ("Qwen/Qwen2.5-0.5B-Instruct", commits[0])
    assert [config["data"][name][0]["revision"] for name in ("train", "eval")] == [commits[1]] * 2
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [1, 2]
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not [content for content in written if TOKEN.encode() in content]
    assert TOKEN not in done.stdout + done.stderr + again.stdout + again.stderr
