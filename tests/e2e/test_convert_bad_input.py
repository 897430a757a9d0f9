"""Wrong input to the conversion tools: exit code 2, a message with tensor and shapes, no output folder."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_mega.convert.hf_to_megatron import hf_to_megatron
from grpo_mega.convert.megatron_to_hf import megatron_to_hf
from tests.helpers.jobs import REPOSITORY
from tests.helpers.tiny_models import make_tiny_model

INDEX = "model.safetensors.index.json"
DOWN, UP = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sharded_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the checkpoint `hf` in several files, and its conversion `megatron`."""
    root = tmp_path_factory.mktemp("sharded")
    make_tiny_model(root / "single", "llama", vocab=21)
    hf_to_megatron(root / "single", root / "megatron")
    megatron_to_hf(root / "megatron", root / "hf", shard_bytes=150_000)
    return root


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a tool's command line in this process; return its exit code and stderr. Other exceptions are raised."""
    threads = torch.get_num_threads()

    def run(tool: str, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", [tool, *map(str, arguments)])
        capsys.readouterr()
        try:
            code: int = runpy.run_path(str(REPOSITORY / "tools" / tool))["main"]()
        finally:
            torch.set_num_threads(threads)
        return code, capsys.readouterr().err

    return run


def file_of_tensor(folder: Path, name: str) -> Path:
    return folder / str(json.loads((folder / INDEX).read_text())["weight_map"][name])


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def change_tensors(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = file_of_tensor(folder, name)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def swap_files(placed: dict[str, str]) -> None:
    other = next(file for file in placed.values() if file != placed[DOWN])
    placed[DOWN] = other


def drop_tensor(folder: Path) -> None:
    change_tensors(folder, DOWN, lambda t: t.pop(DOWN))
    change_index(folder, lambda placed: placed.pop(DOWN))


def add_to_another_file(folder: Path) -> None:
    tensor = load_file(file_of_tensor(folder, DOWN))[DOWN]
    other = next(
        name
        for name in json.loads((folder / INDEX).read_text())["weight_map"]
        if file_of_tensor(folder, name) != file_of_tensor(folder, DOWN)
    )
    change_tensors(folder, other, lambda t: t.update({DOWN: tensor}))


def add_unknown_tensor(folder: Path) -> None:
    change_tensors(folder, DOWN, lambda t: t.update({"model.extra.weight": torch.ones(3, 2)}))
    change_index(folder, lambda placed: placed.update({"model.extra.weight": placed[DOWN]}))


def reshape_tensor(folder: Path) -> None:
    change_tensors(folder, DOWN, lambda t: t.update({DOWN: t[DOWN][:, :-1].clone()}))


def change_dtype(folder: Path) -> None:
    change_tensors(folder, DOWN, lambda t: t.update({DOWN: t[DOWN].long()}))


def truncate_file(folder: Path) -> None:
    path = file_of_tensor(folder, DOWN)
    os.truncate(path, path.stat().st_size - 1000)


def claim_huge_header(folder: Path) -> None:
    file_of_tensor(folder, DOWN).write_bytes((2**62).to_bytes(8, "little") + bytes(100))


def replace_file_by_folder(folder: Path) -> None:
    path = file_of_tensor(folder, DOWN)
    path.unlink()
    path.mkdir()


DOWN_SHAPED = rf"{DOWN} of shape \(128, 96\)"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        truncate_file,
        r"bytes, its header says \d+; of \S+ of shape \(\d+.*\) there is \(\d+.*\)\); download",
    ),
    "missing shard": (
        lambda f: file_of_tensor(f, DOWN).unlink(),
        r"was not found; the index places model\.\S+ of shape \(",
    ),
    "shape": (reshape_tensor, rf"{DOWN} has shape \(128, 95\), config.json says \(128, 96\)"),
    "dtype": (change_dtype, rf"{DOWN_SHAPED} has dtype torch.int64, a weight of shape \(128, 96\) is float32"),
    "tensor missing": (drop_tensor, rf"tensors {DOWN_SHAPED} missing"),
    "tensor left over": (add_unknown_tensor, r"model.extra.weight of shape \(3, 2\) unknown"),
    "index lies": (
        lambda f: change_index(f, swap_files),
        rf"holds no {DOWN_SHAPED}, which the index places there, .* holds it with shape \(128, 96\)",
    ),
    "in two files": (
        add_to_another_file,
        rf"holds {DOWN_SHAPED}, which the index places in model-\S+ with shape \(128, 96\)",
    ),
    "index garbage": (lambda f: (f / INDEX).write_text("{"), r"is not an index of safetensors files"),
    "header garbage": (
        lambda f: file_of_tensor(f, DOWN).write_bytes(b"\xff" * 300),
        r"cannot be read \(a header of \d+ bytes\)",
    ),
    "header huge": (claim_huge_header, r"cannot be read \(a header of 4611686018427387904 bytes\)"),
    "shard is a folder": (replace_file_by_folder, r"was not found; the index places model\.\S+ of shape \("),
    "config missing": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "config garbage": (lambda f: (f / "config.json").write_bytes(b"\xff\x00"), r"config\.json: not valid JSON"),
    "config list": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json: must be a JSON object"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_folder_is_rejected_with_the_reason(
    sharded_checkpoint: Path, tmp_path: Path, fault: str, run_tool: Callable[..., tuple[int, str]]
) -> None:
    shutil.copytree(sharded_checkpoint / "hf", tmp_path / "damaged")
    DAMAGE[fault][0](tmp_path / "damaged")
    code, stderr = run_tool("hf_to_megatron.py", tmp_path / "damaged", tmp_path / "out")
    assert code == 2
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert re.search(DAMAGE[fault][1], stderr), stderr
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_invalid_outputs_are_rejected(
    sharded_checkpoint: Path, tmp_path: Path, run_tool: Callable[..., tuple[int, str]]
) -> None:
    hf, megatron = sharded_checkpoint / "hf", sharded_checkpoint / "megatron"
    before = sorted(sharded_checkpoint.rglob("*"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    for out, rule in {
        tmp_path / "file": "exists and is not empty",
        tmp_path / "full": "exists and is not empty",
        tmp_path / "file" / "below": "Not a directory",
        Path("/proc/no_such_folder/out"): "/proc/no_such_folder",
        tmp_path / ("x" * 300): "File name too long",
    }.items():
        for tool, source in (("hf_to_megatron.py", hf), ("megatron_to_hf.py", megatron)):
            code, stderr = run_tool(tool, source, out)
            assert (code, rule in stderr) == (2, True), stderr
    for tool, source in (("hf_to_megatron.py", hf), ("megatron_to_hf.py", megatron)):
        for out in (source, source / "deeper" / "out"):
            code, stderr = run_tool(tool, source, out)
            assert code == 2
            assert "use a folder elsewhere" in stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    assert sorted(sharded_checkpoint.rglob("*")) == before


@pytest.mark.parametrize("limit", [2_000, 60_000])
@pytest.mark.parametrize(("tool", "source"), [("hf_to_megatron.py", "hf"), ("megatron_to_hf.py", "megatron")])
def test_a_full_disk_ends_with_exit_code_2_and_no_output(
    sharded_checkpoint: Path,
    tmp_path: Path,
    run_tool: Callable[..., tuple[int, str]],
    tool: str,
    source: str,
    limit: int,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code, stderr = run_tool(tool, sharded_checkpoint / source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "no space left for" in stderr
    assert "of shape (" in stderr
    assert list(tmp_path.iterdir()) == []


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return the data with some bytes changed, removed or duplicated."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found))
        kind = rng.randrange(4)
        if kind == 0:
            found[at] = rng.randrange(256)
        elif kind == 1:
            del found[at : at + rng.randint(1, 40)]
        elif kind == 2:
            found[at:at] = found[at : at + rng.randint(1, 40)]
        else:
            found[at : at + 1] = rng.choice([b"0", b"-", b"9999999999", b"null", b'"', b"}", b"[", b"\xff"])
        found = found or bytearray(b"x")
    return bytes(found)


FILES = {
    "hf/config.json": "hf_to_megatron.py",
    f"hf/{INDEX}": "hf_to_megatron.py",
    "hf/model-00002-of-00006.safetensors": "hf_to_megatron.py",
    "megatron/release/.metadata": "megatron_to_hf.py",
    "megatron/release/__0_0.distcp": "megatron_to_hf.py",
    "megatron/latest_checkpointed_iteration.txt": "megatron_to_hf.py",
    "megatron/hf/config.json": "megatron_to_hf.py",
}


@pytest.mark.parametrize("name", FILES)
def test_random_damage_never_gives_a_traceback_or_a_partial_result(
    sharded_checkpoint: Path, tmp_path: Path, run_tool: Callable[..., tuple[int, str]], name: str
) -> None:
    rng, source = random.Random(name), name.split("/")[0]
    shutil.copytree(sharded_checkpoint / source, tmp_path / source)
    whole = (tmp_path / name).read_bytes()
    head = 3000 if name.endswith((".safetensors", ".distcp")) else len(whole)  # the rest is numbers
    rejected = 0
    for _ in range(12):
        (tmp_path / name).write_bytes(damage_bytes(whole[:head], rng) + whole[head:])
        code, stderr = run_tool(FILES[name], tmp_path / source, tmp_path / "out")
        assert code in (0, 2), stderr
        assert (tmp_path / "out").exists() == (code == 0)
        assert not (tmp_path / "out.partial").exists()
        rejected += code == 2
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert rejected >= 3
