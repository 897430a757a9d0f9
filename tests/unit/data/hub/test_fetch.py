"""Models and data sets by name: files in the cache, commits in the config, and the message of every failure."""

from __future__ import annotations

import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from grpo_mega.cli import fetch
from grpo_mega.config.hub_names import snapshot_folder
from grpo_mega.config.load import load_config, resolved
from grpo_mega.config.schema import Config
from grpo_mega.data.hub.fetch import pinned_overrides, with_hub_inputs
from grpo_mega.data.prompt_rows import check_rows, keyed_sets, read_rows
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names
from tests.helpers.hub_server import TOKEN, HubServer, environment_of, hub_server

MODEL: dict[str, bytes | None] = {
    "config.json": b'{"model_type": "qwen3"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": b"import os",
    "original/consolidated.safetensors": b"again",
    "README.md": b"# A model",
}
DOWNLOADED = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*}
---
# Sums
"""


def parquet(*rows: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file.getvalue()


def rows(*numbers: int) -> list[dict[str, Any]]:
    return [{"question": f"{n} + 1 = ?", "answer": str(n + 1)} for n in numbers]


SUMS: dict[str, bytes | None] = {
    "README.md": CARD.encode(),
    "main/train-00000-of-00002.parquet": parquet(*rows(1, 2)),
    "main/train-00001-of-00002.parquet": parquet(*rows(3)),
    "main/test-00000-of-00001.parquet": parquet(*rows(4)),
    "socratic/train-00000-of-00001.parquet": parquet(*rows(5)),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Serve a model and two data sets; the working directory and the cache are new folders."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with hub_server() as server:
        for name, value in environment_of(server, tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        server.add("models/lab/tiny", MODEL)
        server.add("datasets/lab/sums", SUMS)
        lines = "".join(f"{json.dumps(row)}\n" for row in rows(7, 8)).encode()
        server.add("datasets/lab/lines", {"train.jsonl": lines, "loader.py": b"import os"})
        yield server


def config_with(*overrides: str, model: str = "lab/tiny", train: Any = "lab/lines", **more: Any) -> Config:
    path = Path("run.yaml")
    values = {
        "model": {"path": model},
        "data": {"train": train},
        "reward": {"terms": [{"name": "exact"}]},
        "train": {"steps": 1},
    }
    path.write_text(yaml.safe_dump(values | more))
    return load_config(path, overrides)


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def answers(config: Config) -> list[str]:
    """Return the answers of all rows of `data.train`."""
    (key, source), *_ = keyed_sets(config.data)
    return [row.answer for row in read_rows(source, key, config.data) if row is not None]


def test_only_config_tokenizer_and_safetensors_of_a_model_are_downloaded(hub: HubServer) -> None:
    config = with_hub_inputs(config_with())
    commit = hub.repositories["models/lab/tiny"].branches["main"]
    assert config.model.revision == commit
    assert config.model.folder == snapshot_folder("model", "lab/tiny", commit)
    assert names_in(config.model.folder) == DOWNLOADED
    assert not [path for path in hub.downloads() if path.endswith((".bin", ".py"))]


def test_a_process_whose_config_names_the_commits_asks_the_hub_nothing(hub: HubServer) -> None:
    first = with_hub_inputs(config_with(train=[{"path": "lab/sums", "config": "main", "split": "train"}]))
    hub.requests.clear()
    again = with_hub_inputs(config_with(*pinned_overrides(first)))
    assert (again.model, again.data) == (first.model, first.data)
    assert hub.requests == []


def test_one_split_of_one_configuration_is_downloaded_and_read_in_order(hub: HubServer) -> None:
    config = with_hub_inputs(config_with(train=[{"path": "lab/sums", "config": "main", "split": "train"}]))
    assert answers(config) == ["2", "3", "4"]
    (source,) = config.data.train_sets
    folder = snapshot_folder("dataset", "lab/sums", str(source.revision))
    assert names_in(folder) == ["README.md", *(f"main/train-0000{i}-of-00002.parquet" for i in range(2))]


def test_a_data_set_without_a_description_has_the_splits_of_its_file_names(hub: HubServer) -> None:
    config = with_hub_inputs(config_with(train="lab/lines"))
    assert answers(config) == ["8", "9"]
    assert not [path for path in hub.downloads() if path.endswith(".py")]


def test_a_row_is_named_by_the_data_set_and_its_file(hub: HubServer) -> None:
    config = with_hub_inputs(
        config_with(train="lab/lines", **{"data": {"train": "lab/lines", "answer_key": "solution"}})
    )
    with pytest.raises(UserError) as caught:
        check_rows(config.data)
    assert_names(caught.value, "lab/lines/train.jsonl:1", "'solution'", "answer", "question", "data.answer_key")


def test_a_folder_or_file_takes_precedence_over_a_name_of_the_hub(hub: HubServer) -> None:
    Path("lab/tiny").mkdir(parents=True)
    Path("lab/lines").write_text(json.dumps({"question": "1", "answer": "2"}))
    config = with_hub_inputs(config_with())
    assert config.model.path == str(Path("lab/tiny").absolute())
    assert answers(config) == ["2"]
    assert hub.requests == []


def test_the_cache_alone_suffices_without_a_connection(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = with_hub_inputs(config_with())
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    after = with_hub_inputs(config_with())
    assert resolved(after) == resolved(before)
    assert hub.requests == []


def test_files_that_another_program_downloaded_are_used_without_a_connection(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    for kind, name, files in (("model", "lab/tiny", [*MODEL]), ("dataset", "lab/lines", ["train.jsonl"])):
        for file in files:
            hf_hub_download(name, file, repo_type=kind, endpoint=hub.url, cache_dir=Path("../cache/hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = with_hub_inputs(config_with())
    assert answers(config) == ["8", "9"]
    assert (config.model.folder / "model.safetensors").read_bytes() == b"weights"


def test_a_run_continues_with_the_commits_that_its_folder_records(hub: HubServer) -> None:
    before = with_hub_inputs(config_with())
    folder = Path(str(before.run.dir))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved(before)))
    hub.repositories["models/lab/tiny"].commit(MODEL | {"model.safetensors": b"newer weights", "vocab.json": b"{}"})
    hub.repositories["datasets/lab/lines"].commit({"train.jsonl": b"", "new.txt": b""})
    assert resolved(with_hub_inputs(config_with())) == resolved(before)
    newer = with_hub_inputs(config_with("run.overwrite=true"))
    assert newer.model.revision == hub.repositories["models/lab/tiny"].branches["main"] != before.model.revision


def test_a_branch_and_a_commit_are_revisions(hub: HubServer) -> None:
    repository = hub.repositories["models/lab/tiny"]
    old = repository.branches["main"]
    repository.commit(MODEL | {"vocab.json": b"{}"})
    draft = repository.commit(MODEL | {"merges.txt": b""}, branch="draft")
    for revision, commit in (("draft", draft), (old, old)):
        assert with_hub_inputs(config_with(f"model.revision={revision}")).model.revision == commit


def test_a_sharded_model_has_the_shards_that_its_index_names(hub: HubServer) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    shards: dict[str, bytes | None] = {f"model-{i}.safetensors": b"w" for i in (1, 2, 3)}
    single = {name: content for name, content in MODEL.items() if name != "model.safetensors"}
    hub.add("models/lab/large", single | shards | {"model.safetensors.index.json": json.dumps(index).encode()})
    config = with_hub_inputs(config_with(model="lab/large"))
    found = [name for name in names_in(config.model.folder) if "safetensors" in name]
    assert found == ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]


def test_the_token_of_the_environment_opens_a_gated_model_and_is_written_nowhere(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("models/lab/gated", MODEL, gated=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch.main(["run.yaml"]) == 2  # there is no such file yet
    config_with(model="lab/gated")
    assert fetch.main(["run.yaml", "--json"]) == 0
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in "".join(capsys.readouterr())
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [content for content in written if TOKEN.encode() in content]


def test_the_token_of_a_login_is_not_used(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "token").write_text(TOKEN)
    with_hub_inputs(config_with())
    assert hub.tokens == {None}


NO_SHARD = {
    "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}',
    "model-2.safetensors": b"w",
}
NO_SINGLE = {name: content for name, content in MODEL.items() if name != "model.safetensors"}
BOTH = ("correct the path", "correct the name")

# What is served besides, the config's model and data, and what the message names in this order.
FAILURES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "unknown model": ({}, {"model": "lab/tyni"}, ("model.path=lab/tyni", "no file or folder", *BOTH)),
    "unknown data set": ({}, {"train": "lab/smus"}, ("data.train=lab/smus", "no file or folder", *BOTH)),
    "data set in a list": (
        {}, {"train": [{"path": "lab/smus"}]}, ("data.train[0].path=lab/smus", "no file or folder", *BOTH)
    ),
    "neither path nor name": ({}, {"model": "tiny"}, ("model.path=", "tiny", "is not a folder", "hub")),
    "wrong revision": (
        {}, {"more": ["model.revision=v9"]}, ("model.revision=v9", "not found", "lab/tiny", "branch, tag or commit")
    ),
    "wrong revision of a set": (
        {}, {"train": [{"path": "lab/lines", "revision": "v9"}]},
        ("data.train[0].revision=v9", "not found", "lab/lines", "branch, tag or commit"),
    ),
    "gated": ({"models/lab/gated": MODEL}, {"model": "lab/gated"}, ("lab/gated", "gated", "HF_TOKEN", "set HF_TOKEN")),
    "no weights in safetensors": (
        {"models/lab/old": NO_SINGLE}, {"model": "lab/old"}, ("lab/old", "model.safetensors", "pickled", "convert")
    ),
    "no config": ({"models/lab/bare": {"a": b""}}, {"model": "lab/bare"}, ("lab/bare", "config.json", "revision")),
    "a shard that is not there": (
        {"models/lab/part": NO_SINGLE | NO_SHARD}, {"model": "lab/part"},
        ("lab/part", "model-1.safetensors", "not found", "complete repository"),
    ),
    "a file that is listed only": (
        {"models/lab/hole": MODEL | {"model.safetensors": None}}, {"model": "lab/hole"},
        ("lab/hole", "model.safetensors", "not found", "complete repository"),
    ),
    "no configuration named": (
        {}, {"train": "lab/sums"}, ("data.train=lab/sums", "config must name one of main, socratic", "config: main")
    ),
    "wrong configuration": (
        {}, {"train": [{"path": "lab/sums", "config": "mains", "split": "train"}]},
        ("lab/sums", "config=mains", "main, socratic", "config: main"),
    ),
    "no split named": (
        {}, {"train": [{"path": "lab/sums", "config": "main"}]},
        ("lab/sums", "split must name one of train, test", "config: main, split: train"),
    ),
    "wrong split": (
        {}, {"train": [{"path": "lab/sums", "config": "main", "split": "training"}]},
        ("lab/sums", "split=training", "train, test", "split: train"),
    ),
    "no data files": ({"datasets/lab/code": {"loader.py": b""}}, {"train": "lab/code"}, ("lab/code", "no data files")),
    "another format": (
        {"datasets/lab/table": {"train.csv": b"a,b"}}, {"train": "lab/table"}, ("lab/table", ".csv", "save_to_disk")
    ),
}  # fmt: skip


def fails_with(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Run `grpo-mega fetch`; return its message after checking exit code, form and duration."""
    begin = time.monotonic()
    assert fetch.main(["run.yaml", *overrides]) == 2
    assert time.monotonic() - begin < 10
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return message


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_message(hub: HubServer, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    served, values, named = FAILURES[case]
    for name, files in served.items():
        hub.add(name, files, gated="gated" in name)
    values = dict(values)
    more = values.pop("more", [])
    config_with(**values)
    if case == "neither path nor name":  # a later check reports it, as for any folder
        from grpo_mega.doctor.model_rules import configured_spec

        with pytest.raises(UserError) as caught:
            configured_spec(config_with(**values))
        assert_names(caught.value, *named)
        return
    assert_names(fails_with(capsys, *more), *named)


def test_a_token_without_access_is_named_as_such(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("models/lab/gated", MODEL, gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_another_account")
    config_with(model="lab/gated")
    message = fails_with(capsys)
    assert_names(message, "model.path=lab/gated", "gated", "the token of HF_TOKEN is used", "accept its terms")
    assert "hf_of_another_account" not in message


def test_an_address_where_nothing_listens_is_one_message(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    config_with()
    assert_names(fails_with(capsys), "model.path=lab/tiny", f"127.0.0.1:{port}", "correct the path", "HF_HUB_OFFLINE=1")


def test_a_server_that_never_answers_is_one_message(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("grpo_mega.data.hub.repository.ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        config_with()
        assert_names(fails_with(capsys), "model.path=lab/tiny", "did not give", "HF_ENDPOINT")


def test_a_model_that_is_not_in_the_cache_is_named_without_a_connection(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config_with()
    assert_names(fails_with(capsys), "model.path=lab/tiny", "HF_HUB_OFFLINE=1", "main", "grpo-mega fetch")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.path=/tmp", "model.revision=main"], ("model.revision=main", "no effect", "leave it out")),
        (
            ["data.train=[{path: /tmp/a.jsonl, config: main}]"],
            ("data.train[0].config=main", "no effect", "leave it out"),
        ),
    ],
)
def test_a_key_of_the_hub_without_a_name_of_the_hub_is_an_error(
    hub: HubServer, overrides: list[str], named: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        config_with(*overrides)
    assert_names(caught.value, *named)
