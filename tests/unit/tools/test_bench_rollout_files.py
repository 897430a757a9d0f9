"""tools/bench_rollout_files.py on a small part: sizes of columns, and the object on the last line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools.bench_rollout_files import main


def test_the_bytes_per_token_are_those_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--rollouts", "32", "--tokens", "512", "--rounds", "1", "--dir", str(tmp_path), "--json"]
    monkeypatch.setattr(sys, "argv", ["bench_rollout_files.py", *arguments])
    main()  # its exit code depends on the speed of the machine
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    engine, both = found["engine"], found["engine_and_policy"]
    assert engine["tokens"] == both["tokens"] == 32 * (512 + 256)
    assert engine["bytes_per_token"] < 6
    assert set(engine["bytes_per_token_of"]) >= {"completion_ids", "sampler_log_probs"}
    added = both["bytes_per_token"] - engine["bytes_per_token"]
    assert added == pytest.approx(both["bytes_per_token_of"]["mismatch"], rel=0.05)
    assert found["ratio"] == found["measured"] / found["reference"]
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_number_is_rejected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_rollout_files.py", "--rollouts", "0"])
    assert main() == 2
    assert "must be at least 1" in capsys.readouterr().err
