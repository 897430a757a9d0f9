"""tools/compare_algorithms.py: result of a run, table, plot, and input errors before any run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import compare_algorithms
from tools.compare_algorithms import main, plot, read, table

MIB = 2**20


def write_run(folder: Path, critic: bool) -> Path:
    """Write a run of three steps; the first is slower and larger than the others."""
    folder.mkdir(parents=True)
    lines = []
    for step, (seconds, accuracy) in enumerate([(90.0, 0.5), (2.0, 0.6), (4.0, 0.7)], 1):
        line: dict[str, Any] = {"step": step, "reward/accuracy": accuracy, "group/discarded": 2.0}
        for phase in ("rollout", "train", *(("critic",) if critic else ())):
            line |= {f"time/{phase}_seconds": seconds / 4, f"memory/peak_{phase}_bytes": (100 - step) * MIB}
        for who in ("policy", *(("critic",) if critic else ())):
            line |= {f"memory/{who}_{part}_bytes": size for part, size in (("params", 4e6), ("grads", 4e6))}
            line[f"memory/{who}_optimizer_bytes"] = 8e6 if step > 1 else 0.0
        lines.append(line | {"time/step_seconds": seconds})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = {"eval_before": {"accuracy": 0.48}, "eval_after": {"accuracy": 0.95, "greedy_accuracy": 0.97}}
    (folder / "summary.json").write_text(json.dumps(evaluations))
    return folder


def test_a_run_is_read_by_hand(tmp_path: Path) -> None:
    found = read("ppo", write_run(tmp_path / "ppo", critic=True))
    assert (found.accuracy_before, found.accuracy, found.greedy_accuracy) == (0.48, 0.95, 0.97)
    assert found.policy_bytes == found.critic_bytes == {"params": 4_000_000, "grads": 4_000_000, "optimizer": 8_000_000}
    assert found.trainable_bytes == 32_000_000
    assert found.peak_bytes == {"rollout": 98 * MIB, "critic": 98 * MIB, "train": 98 * MIB}  # not the first step's 99
    assert found.step_seconds == 3.0
    assert found.discarded_groups == 6
    assert found.curve == [0.5, 0.6, 0.7]


def test_the_table_compares_with_the_first_algorithm(tmp_path: Path) -> None:
    results = [read(name, write_run(tmp_path / name, critic=name == "ppo")) for name in ("grpo", "ppo")]
    assert table(results).splitlines() == [
        "| algorithm | before | after | greedy | trainable MB | / first | s/step | discarded groups "
        "| peak rollout, MiB | peak critic, MiB | peak train, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `grpo` | 0.480 | 0.950 | 0.970 | 16.00 | 1.00 | 3.00 | 6 | 98 |  | 98 |",
        "| `ppo` | 0.480 | 0.950 | 0.970 | 32.00 | 2.00 | 3.00 | 6 | 98 | 98 | 98 |",
    ]


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; the extra dev has it")
    plot([read("ppo", write_run(tmp_path / "ppo", critic=True))], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithms", "grpo,dqn"], "--algorithms: 'dqn' must be one of grpo, dr_grpo"),
        (["--algorithms", ","], "--algorithms=',' must name at least one"),
        (["data.eval=null"], "data.eval=null: algorithms are compared by held-out accuracy"),
        (["optimizer.lr=fast"], "optimizer.lr"),
        (["no/such.yaml"], "no/such.yaml"),
    ],
)
def test_wrong_input_is_one_message_and_nothing_starts(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare_algorithms, "run", lambda *_, **__: pytest.fail("something was started"))
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = type("Ended", (), {"returncode": 1})
    monkeypatch.setattr(compare_algorithms.subprocess, "run", lambda *_, **__: failing)
    assert main(["--algorithms", "grpo", "--out", str(tmp_path)]) == 1
    assert "the run of algorithm.name=grpo failed" in capsys.readouterr().err


def test_finished_runs_give_one_object_on_the_last_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = type("Ended", (), {"returncode": 0})
    monkeypatch.setattr(compare_algorithms.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(compare_algorithms, "plot", lambda *_: None)
    write_run(tmp_path / "ppo", critic=True)
    assert main(["train.steps=3", "--algorithms", "ppo", "--json", "--out", str(tmp_path)]) == 0
    (result,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["algorithm"] == "ppo"
    assert "`ppo`" in (tmp_path / "table.md").read_text()
