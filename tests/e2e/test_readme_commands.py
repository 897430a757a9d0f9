"""Commands and paths of README and the guides: every path exists, and every command is accepted.

A command that trains for minutes runs only the checks that precede the start; other files of this folder run the jobs.
Every script must print its help.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from grpo_mega.config.load import load_config
from grpo_mega.launch.restarts import take_restarts
from grpo_mega.train import prepare
from tests.helpers.jobs import REPOSITORY
from tests.helpers.tiny_models import make_tiny_model

GUIDES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
FOLDERS = ("launch", "tools", "configs", "docs", "tests", "docker", "constraints", "grpo_mega", ".ci")
_BLOCK = re.compile(r"^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^ {4}(\S.*)$", re.MULTILINE)
_PATH = re.compile(rf"(?<![\w./-])((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*[\w/])")


def script_commands() -> list[str]:
    """Return the lines that start a script of the repository, without comments, prompts and variables before them."""
    found = []
    for guide in GUIDES:
        text = guide.read_text(encoding="utf-8").replace("\\\n", "")  # a command may continue on the next line
        commands = [command for block in _BLOCK.findall(text) for command in words_of(block.splitlines())]
        for words in commands + [shlex.split(line, comments=True) for line in _INDENTED.findall(text)]:
            while words and (re.fullmatch(r"[A-Z_]+=.*", words[0]) or words[0] in ("python", "$")):
                words.pop(0)
            if len(words) > 1 and words[0] == "launch/tool.sh":
                words[:2] = [f"tools/{words[1]}.py"]
            if words and words[0].startswith(("launch/", "tools/", ".ci/")):
                found.append(shlex.join(words))
    return sorted(set(found))


def words_of(lines: list[str]) -> list[list[str]]:
    """Return the words of each command; a quoted argument may have several lines."""
    found, text = [], ""
    for line in lines:
        text += line
        try:
            found.append(shlex.split(text, comments=True))
            text = ""
        except ValueError:  # a quote is open
            text += "\n"
    assert not text, f"a quote is never closed: {text}"
    return found


def paths_in_guides() -> list[tuple[str, str]]:
    """Return (guide, path) for every path of the repository in a guide."""
    return sorted(
        {
            (str(guide.relative_to(REPOSITORY)), path)
            for guide in GUIDES
            for path in _PATH.findall(guide.read_text(encoding="utf-8"))
        }
    )


def train_arguments(command: str) -> list[str]:
    return shlex.split(command)[1:]


def test_the_guides_hold_the_two_commands() -> None:
    assert {"launch/train.sh", "launch/test.sh"} <= set(script_commands())
    assert len(paths_in_guides()) > 10


def test_every_path_that_a_guide_names_exists() -> None:
    assert [f"{guide}: {path}" for guide, path in paths_in_guides() if not (REPOSITORY / path).exists()] == []


def training_commands() -> list[str]:
    """Return the commands that need nothing that an earlier command of their guide has written.

    tests/e2e/test_first_own_run.py and tests/e2e/test_guides.py run the others. A command with `observe.trackers` needs
    their libraries (tests/unit/docs/test_watching_guide.py, tests/e2e/test_trackers_long.py).
    """
    commands = [command for command in script_commands() if shlex.split(command)[0] == "launch/train.sh"]
    others = ("own_run.yaml", "model.checkpoint=", "observe.trackers=")
    return [command for command in commands if not any(other in command for other in others)]


@pytest.mark.parametrize("command", training_commands())
def test_every_training_command_passes_all_checks_that_come_before_the_start(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(REPOSITORY)
    stub = tmp_path / "stub.jsonl"
    stub.write_text(json.dumps({"question": "What is 3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}) + "\n")
    _, given = take_restarts(train_arguments(command))
    arguments = [a.replace("FILE.jsonl", str(stub)) for a in given]
    config = arguments.pop(0) if arguments and "=" not in arguments[0] else "configs/quickstart.yaml"
    own_folder = f"run.dir={tmp_path / 'run'}"  # the default run folder may contain a run of another config
    prepared = prepare(load_config(Path(config), [*arguments, own_folder]))
    assert len(prepared.train_data) > 0
    for override in arguments:
        if override.startswith(("run.dir=", "reward.terms=")):  # names of functions become paths
            continue
        key, _, value = override.partition("=")
        found = functools.reduce(getattr, key.split("."), prepared.config)
        assert (list(found) if isinstance(found, tuple) else found) == yaml.safe_load(value), key


def launch_scripts() -> list[str]:
    named = {shlex.split(command)[0] for command in script_commands()} | {path for _, path in paths_in_guides()}
    there = [name for name in named if name.startswith(("launch/", "tools/")) and (REPOSITORY / name).is_file()]
    return sorted(name for name in there if name != "launch/env.sh")  # this file is sourced


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(name, marks=[pytest.mark.long] if name.endswith(".py") else [])  # each imports torch
        for name in launch_scripts()
    ],
)
def test_every_script_that_a_guide_names_prints_its_help(script: str) -> None:
    command = [sys.executable, script] if script.endswith(".py") else [script]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    shown = subprocess.run(
        [*command, "--help"], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout + shown.stderr != ""
    assert "usage: " in shown.stdout + shown.stderr
    assert Path(script).name in shown.stdout + shown.stderr


def test_the_score_command_writes_rewards(tmp_path: Path) -> None:
    """Run the command of docs/rewards.md."""
    (command,) = [c for c in script_commands() if c.startswith("tools/score.py")]
    row = {"prompt": "1+1?", "completion": "so it is 2\n#### 2", "answer": "1+1=2\n#### 2"}
    (tmp_path / "completions.jsonl").write_text(json.dumps(row) + "\n")
    script, *arguments = shlex.split(command)
    arguments = arguments[: arguments.index(">")]
    scored = subprocess.run(
        [sys.executable, str(REPOSITORY / script), *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout.splitlines()[0])["reward"] == 1.0


def test_the_conversion_commands_convert_in_both_directions(tmp_path: Path) -> None:
    """Run the commands of docs/convert.md and README.md in this order; test_guides.py has those that convert a run."""
    make_tiny_model(tmp_path / "HF_DIR", "llama")
    ran = []
    for tool in ("hf_to_megatron", "megatron_to_hf", "compare_checkpoints"):
        for command in (c for c in script_commands() if c.startswith(f"tools/{tool}.py") and "runs/" not in c):
            script, *arguments = shlex.split(command)
            shutil.rmtree(tmp_path / "HF_AGAIN" if tool == "megatron_to_hf" else tmp_path / "-", ignore_errors=True)
            ended = subprocess.run(
                [sys.executable, str(REPOSITORY / script), *arguments],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
            ran.append(tool)
    assert set(ran) == {"hf_to_megatron", "megatron_to_hf", "compare_checkpoints"}
    assert (tmp_path / "HF_AGAIN" / "digests.json").is_file()
