"""The fifteen mistakes of docs/troubleshooting.md: each is made, its message is the printed one, and its fix works.

Each case runs the entry point of a rank in this process, in a folder with the files of docs/first-own-run.md.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_mega import train
from grpo_mega.config.load import load_config, resolved
from tests.helpers.guides import python_blocks, yaml_blocks
from tests.helpers.hub_server import environment_of, files_of, hub_server
from tests.helpers.jobs import REPOSITORY
from tests.helpers.tiny_models import make_tiny_model

SHOWN_FOLDER = "/home/you/boxes"
"""The folder of the messages in the guide."""
ROWS = [{"question": f"{a} boxes of 3", "answer": f"{a}*3={a * 3} #### {a * 3}"} for a in range(2, 34)]


@dataclass(frozen=True)
class Mistake:
    """The overrides or lines that a user writes, and those that repair them.

    `wrong` and `fix` are overrides, as the guide shows them. `edits` are wrong lines in a file: its name, the right
    text and the wrong one. `repaired` are the overrides of the repaired command, by default `fix`.
    """

    wrong: tuple[str, ...] = ()
    fix: tuple[str, ...] = ()
    edits: tuple[tuple[str, str, str], ...] = ()
    repaired: tuple[str, ...] | None = None
    keeps_edits: bool = False


QUERY = tuple((f"{name}.jsonl", '"question"', '"query"') for name in ("train", "held_out"))
MODEL = "model.path=Qwen/Qwen2.5-0.5B-Instruct"
MISTAKES: dict[str, Mistake] = {
    "wrong path of the rows": Mistake(("data.train=trains.jsonl",), ("data.train=train.jsonl",)),
    "misspelled name on the hub": Mistake(
        ("model.base=null", "model.path=Qwen/Qwen2.5-0.5B-Instrcut"), (MODEL,), repaired=("model.base=null", MODEL)
    ),
    "column with another name": Mistake(
        (),
        ("data.prompt_key=query",),
        QUERY,
        keeps_edits=True,
    ),
    "reward in another file": Mistake(
        ("reward.terms=[{name: my_reward.py:marked}]",), ("reward.terms=[{name: own_reward.py:marked}]",)
    ),
    "misspelled function": Mistake(
        ("reward.terms=[{name: own_reward.py:marks}]",), ("reward.terms=[{name: own_reward.py:marked}]",)
    ),
    "a group of one": Mistake(("sampling.group_size=1",), ("sampling.group_size=2",)),
    "more minibatches than groups": Mistake(("train.minibatches_per_epoch=64",), ("train.minibatches_per_epoch=4",)),
    "ranks that do not divide into replicas": Mistake(
        ("run.world_size=3", "parallel.tp=2"), ("run.world_size=2",), repaired=("run.world_size=2", "parallel.tp=2")
    ),
    "tensor parallelism that does not divide the heads": Mistake(
        ("run.world_size=3", "parallel.tp=3"), ("parallel.tp=1",), repaired=("run.world_size=1", "parallel.tp=1")
    ),
    "prompts longer than the limit": Mistake(("data.max_prompt_tokens=10",), ("data.max_prompt_tokens=24",)),
    "no chat template": Mistake(("data.template=chat",), ("data.template=plain",)),
    "another seed for a run that continues": Mistake(("run.seed=1",), ("run.seed=0",)),
    "a key with its name elsewhere": Mistake(("optimizer.learning_rate=1e-4",), ("optimizer.lr=1e-4",)),
    "a tab in the YAML": Mistake((), (), (("own_run.yaml", "  steps: 20\n", "\tsteps: 20\n"),)),
    "a number format with another name": Mistake(("precision.dtype=float32",), ("precision.dtype=fp32",)),
}


def documented_mistakes() -> dict[str, tuple[str, str, str]]:
    """Return mistake -> (what was written, first line on the screen, what repairs it) of the guide's table."""
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    _, heading, section = text.partition("## Fifteen mistakes of a first day\n")
    assert heading
    found = {}
    for line in section.partition("\n## ")[0].splitlines():
        if re.match(r"\| \d+ \|", line):
            _, mistake, written, message, fix = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            found[mistake] = (written, message.strip("`").replace("\\|", "|"), fix)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write the files of the guide, and serve a hub with one model."""
    (tmp_path / "own_reward.py").write_text(python_blocks("first-own-run.md")["own_reward.py"])
    (tmp_path / "own_run.yaml").write_text(yaml_blocks("first-own-run.md")["own_run.yaml"])
    for name in ("train.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # `main` sets it to 1 when it is unset
    with hub_server() as server:
        server.add("models/Qwen/Qwen2.5-0.5B-Instruct", files_of(make_tiny_model(tmp_path / "made", vocab=72)))
        for name, value in environment_of(server, tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        yield tmp_path


def outcome(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...]
) -> tuple[int, str]:
    """Return exit code and stderr of a rank that would train; 0 if all checks before the start pass."""

    def reached(_: train.Prepared, __: object) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(train, "run_worker", reached)
    monkeypatch.setattr(train, "StopRequests", object)  # the handlers of the test's own process stay
    monkeypatch.setattr(sys, "argv", ["grpo_mega.train", "own_run.yaml", *overrides])
    with pytest.raises(SystemExit) as caught:
        train.main()
    code = caught.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().err


def edit(edits: tuple[tuple[str, str, str], ...]) -> None:
    for name, before, after in edits:
        path = Path(name)
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after))


def test_the_guide_has_these_fifteen_mistakes() -> None:
    assert list(documented_mistakes()) == list(MISTAKES)
    assert len(MISTAKES) == 15


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_the_documented_message_and_the_fix_repairs_it(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mistake = MISTAKES[name]
    written, message, fix = documented_mistakes()[name]
    if name == "another seed for a run that continues":
        values: dict[str, Any] = resolved(load_config(Path("own_run.yaml")))
        run = Path(values["run"]["dir"])
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump(values))
    edit(mistake.edits)
    code, text = outcome(monkeypatch, capsys, mistake.wrong)
    shown = text.replace(str(folder), SHOWN_FOLDER).replace(os.environ["HF_ENDPOINT"], "https://huggingface.co")
    assert (code, shown) == (2, f"{message}\n")
    assert "; " in message  # the remedy follows the rule
    assert [part for part in mistake.wrong if f"`{part}`" not in written] == []
    assert [part for part in mistake.fix if f"`{part}`" not in fix] == []
    if not mistake.keeps_edits:
        edit(tuple((file, wrong, right) for file, right, wrong in mistake.edits))
    code, text = outcome(monkeypatch, capsys, mistake.fix if mistake.repaired is None else mistake.repaired)
    assert code == 0, text
