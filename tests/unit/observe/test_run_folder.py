"""State of the run folder: fresh, continued, finished or rejected; and the files of a continued run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_mega.observe.run_folder import RunFolder, RunState, checkpoints_to_verify, open_run
from grpo_mega.observe.summary import Summary, write_summary
from grpo_mega.types import UserError


def resolved_config(**changes: Any) -> dict[str, Any]:
    """Return a resolved config; `changes` are `section__key=value`."""
    values: dict[str, Any] = {
        "run": {"dir": "somewhere", "seed": 0, "overwrite": False, "world_size": 1},
        "parallel": {"tp": 1, "pp": 1},
        "engine": {"kind": "vllm", "tp": 1},
        "optimizer": {"lr": 1e-5},
        "reward": {"terms": ({"name": "exact", "weight": 1.0},)},
        "train": {"steps": 20},
        "checkpoint": {"every": 10, "keep": 2},
        "observe": {"tensorboard": True},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    return values


def open_folder(
    path: Path, *, overwrite: bool = False, steps: int = 20, resume: str = "auto", **changes: Any
) -> RunState:
    resolved = resolved_config(train__steps=steps, **changes)
    return open_run(path, resolved, overwrite=overwrite, train_steps=steps, resume=resume)


def save_checkpoint(folder: RunFolder, step: int, *, complete: bool = True) -> Path:
    path = folder.checkpoint_of(step)
    path.mkdir(parents=True)
    (path / "weights").write_text("w")
    if complete:
        (path / "complete").touch()
    return path


def metric_steps(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]


def test_a_new_path_is_fresh_and_holds_the_resolved_config(tmp_path: Path) -> None:
    state = open_folder(tmp_path / "deep" / "run")
    assert (state.status, state.step, state.checkpoint, state.previous) == ("fresh", 0, None, None)
    written = yaml.safe_load(state.folder.config.read_text())
    assert written["reward"]["terms"] == [{"name": "exact", "weight": 1.0}]
    assert list(written) == list(resolved_config())


def test_a_folder_with_only_launcher_logs_is_fresh(tmp_path: Path) -> None:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    assert open_folder(tmp_path / "run").status == "fresh"


def test_the_same_command_continues_from_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run").folder
    save_checkpoint(folder, 5)
    newest = save_checkpoint(folder, 10)
    save_checkpoint(folder, 15, complete=False)
    save_checkpoint(folder, 16).rename(folder.checkpoints / "step_000016.tmp")
    state = open_folder(tmp_path / "run")
    assert (state.status, state.step, state.checkpoint) == ("continued", 10, newest)


def test_an_unfinished_run_without_a_checkpoint_continues_from_step_0(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run").folder
    folder.metrics.write_text('{"step": 1}\n')
    state = open_folder(tmp_path / "run")
    assert (state.status, state.step, state.checkpoint) == ("continued", 0, None)
    assert metric_steps(folder) == []


def test_a_run_whose_checkpoint_and_summary_reached_train_steps_is_finished(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run").folder
    newest = save_checkpoint(folder, 20)
    summary = Summary(status="done", steps=20, policy_digest="d")
    write_summary(folder.summary, summary)
    before = folder.config.read_bytes()
    state = open_folder(tmp_path / "run", checkpoint__keep=7)
    assert (state.status, state.step, state.checkpoint, state.previous) == ("finished", 20, newest, summary)
    assert folder.config.read_bytes() == before
    assert open_folder(tmp_path / "run", steps=10).status == "finished"


def test_raising_train_steps_continues_a_finished_run(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run").folder
    save_checkpoint(folder, 20)
    write_summary(folder.summary, Summary(status="done", steps=20))
    state = open_folder(tmp_path / "run", steps=40)
    assert (state.status, state.step) == ("continued", 20)
    assert yaml.safe_load(folder.config.read_text())["train"]["steps"] == 40


@pytest.mark.parametrize("left", [None, Summary(status="interrupted", steps=20), Summary(status="done", steps=10)])
def test_a_run_killed_between_last_checkpoint_and_summary_is_continued(tmp_path: Path, left: Summary | None) -> None:
    folder = open_folder(tmp_path / "run").folder
    save_checkpoint(folder, 20)
    if left is not None:
        write_summary(folder.summary, left)
    state = open_folder(tmp_path / "run")
    assert (state.status, state.step, state.previous) == ("continued", 20, left)


def test_a_finished_run_without_its_last_checkpoints_continues_from_the_newest(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run").folder
    save_checkpoint(folder, 10)
    write_summary(folder.summary, Summary(status="done", steps=20))
    state = open_folder(tmp_path / "run")
    assert (state.status, state.step) == ("continued", 10)


def test_the_error_of_a_different_config_has_each_key_with_both_values(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run").folder
    before = folder.config.read_bytes()
    with pytest.raises(UserError) as caught:
        open_folder(tmp_path / "run", optimizer__lr=3e-4, run__seed=1, engine__kind="sglang", parallel__tp=2)
    message = str(caught.value)
    assert "engine.kind ('vllm' there, 'sglang' now)" in message
    assert "run.seed (0 there, 1 now)" in message
    assert "optimizer.lr" not in message
    assert "parallel.tp" not in message
    assert "checkpoint.resume=PATH" in message
    assert "run.overwrite=true" in message
    assert folder.config.read_bytes() == before


def test_a_different_config_is_an_error_for_a_finished_run_too(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run").folder
    save_checkpoint(folder, 20)
    write_summary(folder.summary, Summary(status="done", steps=20))
    with pytest.raises(UserError, match=r"run\.seed"):
        open_folder(tmp_path / "run", run__seed=3)


@pytest.mark.parametrize(
    "change",
    [
        {"train__steps": 30},
        {"observe__tensorboard": False},
        {"checkpoint__every": 3},
        {"parallel__pp": 2},
        {"run__world_size": 8},
        {"engine__tp": 2},
        {"engine__dp": 2},
        {"engine__ep": 2},
        {"engine__placement": "server"},
        {"engine__urls": ["127.0.0.1:7700"]},
        {"run__dir": "elsewhere"},
        {"run__overwrite": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_changeable_keys_do_not_make_a_config_different(tmp_path: Path, change: dict[str, Any]) -> None:
    open_folder(tmp_path / "run")
    state = open_run(tmp_path / "run", resolved_config(**change), overwrite=False, train_steps=20)
    assert state.status == "continued"
    section, key = next(iter(change)).split("__")
    assert yaml.safe_load(state.folder.config.read_text())[section][key] == next(iter(change.values()))


def test_a_key_that_changes_later_steps_is_reported_until_the_next_checkpoint(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run").folder
    save_checkpoint(folder, 5)
    expected = ("optimizer.lr (1e-05 there, 0.001 now)",)
    for _ in range(2):  # the second start is after a kill before step 6
        state = open_folder(tmp_path / "run", optimizer__lr=1e-3)
        assert (state.status, state.step, tuple(map(str, state.changes))) == ("continued", 5, expected)
    save_checkpoint(folder, 6)
    assert open_folder(tmp_path / "run", optimizer__lr=1e-3).changes == ()


def test_engine_kind_is_not_changeable(tmp_path: Path) -> None:
    open_folder(tmp_path / "run")
    with pytest.raises(UserError, match=r"engine\.kind \('vllm' there, 'sglang' now\)"):
        open_folder(tmp_path / "run", engine__kind="sglang")


def test_overwrite_moves_the_old_folder_to_the_next_free_name(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for number in (1, 2):
        folder = open_folder(path, overwrite=number > 1).folder
        save_checkpoint(folder, number)
    state = open_folder(path, overwrite=True, optimizer__lr=1.0)
    assert (state.status, state.step, state.moved_to) == ("fresh", 0, tmp_path / "run.old-2")
    assert (tmp_path / "run.old-1" / "checkpoints" / "step_000001" / "weights").exists()
    assert (tmp_path / "run.old-2" / "checkpoints" / "step_000002" / "weights").exists()
    assert not state.folder.checkpoints.exists()


def test_continuing_moves_metrics_and_rollouts_after_the_checkpoint_aside(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run").folder
    save_checkpoint(folder, 2)
    folder.metrics.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"step": 4, "a"')
    folder.rollouts.mkdir()
    names = [*(f"step_00000{number}" for number in (1, 2, 3, 4)), "step_000005.jsonl"]  # the last of an older version
    for name in names[:4]:
        (folder.rollouts / name).mkdir()
        for part in ("part-00000.parquet", "part-00001.parquet.tmp"):
            (folder.rollouts / name / part).write_text(f"{name}: damaged, and moved unread")
    (folder.rollouts / names[4]).write_text("{}")
    (folder.rollouts / "step_000006").mkdir()
    discarded = open_folder(tmp_path / "run").discarded
    assert folder.metrics.read_text() == '{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n'
    assert sorted(p.name for p in folder.rollouts.iterdir()) == names[:2]
    assert discarded is not None
    assert (discarded.steps, discarded.folder.parent) == ((3, 4, 5), folder.discarded)
    assert (discarded.folder / "metrics.jsonl").read_text() == '{"step": 3, "a": 3}\n'
    moved = discarded.folder / "rollouts"
    assert sorted(path.name for path in moved.iterdir()) == names[2:]
    assert {str(p.relative_to(moved)): p.read_text() for p in moved.glob("step_*/*")} == {
        f"{name}/part-00000.parquet": f"{name}: damaged, and moved unread" for name in names[2:4]
    }
    assert not list(folder.rollouts.rglob("*.tmp"))
    assert open_folder(tmp_path / "run").discarded is None


def test_a_run_without_a_checkpoint_keeps_its_steps_in_discarded(tmp_path: Path) -> None:
    """Two such starts within a second have two folders."""
    folder = open_folder(tmp_path / "run").folder
    for _ in range(2):
        folder.metrics.write_text('{"step": 1}\n{"step": 2}\n')
        state = open_folder(tmp_path / "run")
        assert (state.step, state.checkpoint) == (0, None)
        assert state.discarded is not None
        assert state.discarded.steps == (1, 2)
    assert len(list(folder.discarded.iterdir())) == 2


def test_a_last_line_cut_before_its_line_end_is_kept_whole(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run").folder
    save_checkpoint(folder, 2)
    folder.metrics.write_text('{"step": 1}\n{"step": 2}')
    open_folder(tmp_path / "run")
    assert folder.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("line", [b"rubbish", b"\x00\xff\xfe\x80", b'{"step": 2, "text": "\xff"}'])
def test_a_broken_line_in_the_middle_is_named_and_nothing_is_removed(tmp_path: Path, line: bytes) -> None:
    folder = open_folder(tmp_path / "run").folder
    folder.metrics.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not a JSON object"):
        open_folder(tmp_path / "run")
    assert line in folder.metrics.read_bytes()


@pytest.mark.parametrize("text", ["run: [1,\n", "just words", "", "\x00", "!!python/object:os.system {}"])
def test_an_unreadable_config_is_a_user_error_of_one_line_unless_overwritten(tmp_path: Path, text: str) -> None:
    folder = open_folder(tmp_path / "run").folder
    folder.config.write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml .*run\.overwrite=true") as caught:
        open_folder(tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert open_folder(tmp_path / "run", overwrite=True).status == "fresh"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_a_run_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds thesis\.txt but no config\.yaml"):
        open_folder(tmp_path / "home", overwrite=overwrite)
    assert [p.name for p in tmp_path.rglob("*")] == ["home", "thesis.txt"]


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_folder(tmp_path / "run")
    with pytest.raises(UserError, match="cannot be written"):
        open_folder(tmp_path / "run" / "below")


def test_resume_never_starts_only_in_a_folder_without_a_run(tmp_path: Path) -> None:
    assert open_folder(tmp_path / "run", resume="never").status == "fresh"
    with pytest.raises(UserError, match=r"checkpoint\.resume=never.* step 0"):
        open_folder(tmp_path / "run", resume="never")
    # before checkpoints are verified, moved aside or copied
    with pytest.raises(UserError, match=r"checkpoint\.resume=never.* step 0"):
        checkpoints_to_verify(tmp_path / "run", resolved_config(), overwrite=False, train_steps=20, resume="never")


def test_resume_path_starts_a_fresh_run_from_that_checkpoint_and_then_continues_its_own(tmp_path: Path) -> None:
    given = save_checkpoint(open_folder(tmp_path / "source").folder, 5)
    first = open_folder(tmp_path / "run", resume=str(given))
    assert (first.status, first.step, first.checkpoint) == ("fresh", 5, given)
    first.folder.metrics.write_text('{"step": 6}\n')
    again = open_folder(tmp_path / "run", resume=str(given))
    assert (again.status, again.step, again.checkpoint) == ("continued", 5, given)
    own = save_checkpoint(first.folder, 10)
    later = open_folder(tmp_path / "run", resume=str(given))
    assert (later.status, later.step, later.checkpoint) == ("continued", 10, own)


def test_resume_path_survives_overwrite_of_the_folder_it_lies_in(tmp_path: Path) -> None:
    given = save_checkpoint(open_folder(tmp_path / "run").folder, 5)
    state = open_folder(tmp_path / "run", overwrite=True, resume=str(given))
    assert (state.status, state.step) == ("fresh", 5)
    assert state.checkpoint == tmp_path / "run.old-1" / "checkpoints" / "step_000005"


def test_a_fork_whose_origin_has_reached_train_steps_is_an_error_with_the_steps_to_use(tmp_path: Path) -> None:
    origin = save_checkpoint(open_folder(tmp_path / "source").folder, 3)
    with pytest.raises(UserError, match=r"checkpoint\.resume=.*step_000003 is at step 3.*use train\.steps=5"):
        open_folder(tmp_path / "fork", resume=str(origin), steps=2)
    assert not (tmp_path / "fork").exists()


def test_resume_path_must_be_complete_and_the_newest_of_its_own_run(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "run").folder
    older, torn = save_checkpoint(folder, 5), save_checkpoint(folder, 6, complete=False)
    newest = save_checkpoint(folder, 10)
    assert open_folder(tmp_path / "run", resume=str(newest)).checkpoint == newest
    with pytest.raises(UserError, match=r"newest complete checkpoint.* step 10"):
        open_folder(tmp_path / "run", resume=str(older))
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        open_folder(tmp_path / "other", resume=str(torn))
    assert not (tmp_path / "other").exists()
