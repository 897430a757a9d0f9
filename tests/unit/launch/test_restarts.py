"""`--restarts N`: the argument, and when a job is started again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from grpo_mega.launch import main
from grpo_mega.launch.rendezvous import RendezvousError
from grpo_mega.launch.restarts import run_with_restarts, take_restarts
from grpo_mega.types import UserError


@pytest.mark.parametrize(
    "arguments",
    [["--restarts", "3", "a.yaml", "b=1"], ["a.yaml", "b=1", "--restarts=3"], ["a.yaml", "--restarts", "3", "b=1"]],
)
def test_the_number_is_taken_from_any_place(arguments: list[str]) -> None:
    assert take_restarts(arguments) == (3, ["a.yaml", "b=1"])


def test_without_it_there_is_no_restart() -> None:
    assert take_restarts(["a.yaml"]) == (0, ["a.yaml"])


@pytest.mark.parametrize(
    ("arguments", "got"), [(["--restarts"], r"\(missing\)"), (["--restarts=x"], "x"), (["--restarts", "-1"], "-1")]
)
def test_a_wrong_number_is_named(arguments: list[str], got: str) -> None:
    with pytest.raises(UserError, match=f"--restarts={got} must be a whole number >= 0; write --restarts 3"):
        take_restarts(arguments)


@pytest.mark.parametrize(
    ("codes", "restarts", "expected"),
    [([1, 1, 0], 2, 0), ([1, 1, 1], 2, 1), ([2], 2, 2), ([143], 2, 143), ([130], 2, 130), ([1], 0, 1), ([1, 0], 5, 0)],
)
def test_only_a_failure_starts_the_job_again(codes: list[int], restarts: int, expected: int) -> None:
    left = list(codes)
    seen: list[list[str]] = []

    def start(arguments: Sequence[str]) -> int:
        seen.append(list(arguments))
        return left.pop(0)

    assert run_with_restarts(start, ["a.yaml", "run.overwrite=true"], restarts) == expected
    assert left == []
    assert seen == [
        ["a.yaml", "run.overwrite=true"],
        *[["a.yaml", "run.overwrite=true", "run.overwrite=false"]] * (len(codes) - 1),
    ]


def test_a_rendezvous_that_fails_is_tried_again() -> None:
    left: list[RendezvousError | int] = [RendezvousError("NODE_RANK 1 did not connect"), 0]

    def start(_: Sequence[str]) -> int:
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert run_with_restarts(start, [], 1) == 0


def test_a_restart_that_would_not_continue_the_run_is_rejected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "read_request", lambda _: main.LaunchRequest(2, True, 10.0, resume="never"))
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert main.main(["train.sh", "a.yaml", "--restarts", "2"]) == 2
    assert "--restarts=2 with checkpoint.resume=never: a restart would not continue the run" in capsys.readouterr().err
