"""Doctor and planner of a config whose model and rows are named on a hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from grpo_mega.cli import doctor, fetch, plan
from tests.helpers.hub_server import HubServer, environment_of, files_of, hub_server
from tests.helpers.tiny_models import make_tiny_model

ROWS = b'{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": "3"}\n'


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Serve a tiny model and two rows; run.yaml in the working directory names both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    values = {
        "run": {"world_size": 1},
        "model": {"path": "lab/tiny"},
        "data": {"train": "lab/rows", "template": "plain", "max_prompt_tokens": 8},
        "sampling": {"max_tokens": 8},
        "reward": {"terms": [{"name": "exact"}]},
        "precision": {"dtype": "fp32"},
        "train": {"steps": 1},
    }
    Path("run.yaml").write_text(yaml.safe_dump(values))
    with hub_server() as server:
        for name, value in environment_of(server, tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        server.add("models/lab/tiny", files_of(make_tiny_model(tmp_path / "made")))
        server.add("datasets/lab/rows", {"train.jsonl": ROWS})
        yield server


def test_the_planner_downloads_only_config_json(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["run.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fits"] is True
    assert [path.rpartition("/")[2] for path in hub.downloads()] == ["config.json"]


def test_the_doctor_downloads_all_but_the_weights_and_says_so(
    hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["run.yaml", "--json"]) == 0
    found = {f["check"]: f for f in json.loads(capsys.readouterr().out.splitlines()[-1])}
    assert (found["checkpoint"]["status"], found["layout"]["status"]) == ("warn", "pass")
    assert "lab/tiny" in found["checkpoint"]["message"]
    assert "grpo-mega fetch" in found["checkpoint"]["remedy"]
    assert not [path for path in hub.downloads() if path.endswith(".safetensors")]
    assert fetch.main(["run.yaml"]) == 0
    assert doctor.main(["run.yaml", "--json"]) == 0
    found = {f["check"]: f for f in json.loads(capsys.readouterr().out.splitlines()[-1])}
    assert found["checkpoint"]["status"] == "pass"
