"""Sampling during training with a real engine server: versions of tokens, use of prompts, and kills of job and server.

At a temperature of 2 the answers of the pre-trained model differ in length. Two rollouts run at a time and get one
token per call, so that sampling takes longer than training and every weight sync finds open answers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from grpo_mega.cli.prompt_use import read_prompt_use
from grpo_mega.parallel.ports import free_port
from tests.helpers.chaos_runs import disturb
from tests.helpers.jobs import SMALL, read_lines, rollouts_of, run_job, run_job_successfully, running_job, wait_for_step
from tests.helpers.servers import RunningServer, serving
from tests.helpers.signals import act_in_phase

STEPS, UPDATES, PER_STEP, GROUP = 6, 2, 8, 8
LIMIT = "guard.timeout_seconds=120"
WRONG = {"WRONG_ENGINE": "stale_layer"}
ASYNCHRONOUS = (
    *SMALL,
    "sampling.temperature=2.0",
    f"train.max_staleness={2 * UPDATES}",
    "train.slice_tokens=1",
    "engine.max_num_seqs=2",
    "algorithm.correction=token_truncated",
    LIMIT,
    f"sampling.group_size={GROUP}",
    "data.eval=arithmetic:heldout",
    "evaluation.every=2",
    "evaluation.k=1",
    "evaluation.max_prompts=8",
    f"train.steps={STEPS}",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    output = tmp_path_factory.mktemp("server") / "log"
    with serving([*SMALL, LIMIT, "engine.max_num_seqs=2"], output, seconds=400.0) as found:
        yield found


def arguments(server: RunningServer, run: Path) -> tuple[str, ...]:
    return (*ASYNCHRONOUS, "engine.placement=server", f"engine.urls=['{server.url}']", f"run.dir={run}")


def test_a_server_samples_while_the_policy_trains(server: RunningServer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_job_successfully(*arguments(server, run), output=tmp_path / "log")
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [2, 4], "evaluations pause sampling"
    assert 0 < max(line["rollout/staleness_max"] for line in lines) <= 2 * UPDATES
    # the mismatch guard compares the tokens of the present weights with the policy: those of other weights differ
    assert all(line["train/mismatch_max"] < 1e-3 for line in lines)
    assert all(line["train/mismatch_tokens"] >= 8 for line in lines), "of the step's rollouts or of new samples"
    several = [row["policy_versions"] for step in range(2, STEPS + 1) for row in rollouts_of(run, step)]
    several = [versions for versions in several if versions is not None]
    assert several, "an answer continues after a weight sync"
    assert all(versions == sorted(versions) for versions in several)
    rows = [row for step in range(1, STEPS + 1) for row in rollouts_of(run, step)]
    assert len(rows) == STEPS * PER_STEP * GROUP
    use = read_prompt_use(run)
    assert len(use.trained) == STEPS * PER_STEP
    assert use.problems() == []


@pytest.mark.long  # tests/unit/trainer/test_engine_probe.py has the comparison without a server
def test_a_wrong_server_is_found_though_no_step_has_tokens_of_the_present_weights(tmp_path: Path) -> None:
    """One layer keeps the first weights. Sampling is faster than training, so the buffer is full before each sync."""
    run = tmp_path / "run"
    of_server = [*SMALL, LIMIT, "engine.max_num_seqs=64"]
    with serving(of_server, tmp_path / "server", 400.0, "tests.helpers.wrong_engine", WRONG) as server:
        keys = ("train.slice_tokens=16", "engine.max_num_seqs=64", f"train.max_staleness={UPDATES}")
        ended = run_job(*arguments(server, run), *keys, "data.eval=null", output=tmp_path / "log")
    assert ended.code == 1, ended.stderr[-2000:]
    assert "step 2: policy and engine differ" in ended.stderr
    assert all(line["step"] == 1 for line in read_lines(run / "metrics.jsonl"))


@pytest.mark.long
def test_a_server_that_was_started_again_continues_the_rollouts_of_the_one_that_was_killed(tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    of_server = [*SMALL, LIMIT, "engine.max_num_seqs=2", f"--port={port}"]
    with ExitStack() as stack:
        server = stack.enter_context(serving(of_server, tmp_path / "server", seconds=400.0))
        job = stack.enter_context(running_job([*arguments(server, run), "train.steps=12"], tmp_path / "log"))
        wait_for_step(run, 2)
        server.process.kill()
        server.process.wait(30)
        stack.enter_context(serving(of_server, tmp_path / "again", seconds=400.0))
        assert job.wait(400) == 0, (tmp_path / "log.err").read_text()[-3000:]
    assert "the engines are rebuilt (1 of 2)" in (tmp_path / "log.err").read_text()
    assert read_prompt_use(run).problems() == []


@pytest.mark.parametrize("phase", ["train", pytest.param("sync", marks=pytest.mark.long)])
def test_a_spare_server_continues_the_rollouts_of_a_server_that_was_killed(
    server: RunningServer, tmp_path: Path, phase: str
) -> None:
    run = tmp_path / "run"
    with serving([*SMALL, LIMIT, "engine.max_num_seqs=2"], tmp_path / "server", seconds=400.0) as own:
        spare = f"engine.spare_urls=['{server.url}']"
        with running_job([*arguments(own, run), spare], tmp_path / "log") as job:
            act_in_phase(job, phase, 2, lambda _: own.process.kill())
            assert job.wait(400) == 0, (tmp_path / "log.err").read_text()[-3000:]
    shown = (tmp_path / "log.err").read_text()
    assert f"engine.spare_urls[0]={server.url} takes the place of engine.urls[0]={own.url}" in shown
    assert "the engines are rebuilt (1 of 2)" in shown
    if phase == "sync":
        assert "the weight sync failed: " in shown
    use = read_prompt_use(run)
    assert len(use.trained) == STEPS * PER_STEP
    assert use.problems() == []


HANGING_REWARD = """
import time
from grpo_mega.rewards import batched_reward

class Scorer:
    def __init__(self):
        self.keys, self.calls = [], 0

    def submit(self, key, row):
        self.keys.append(key)

    def collect(self):
        self.calls += 1
        if self.calls > 3:
            time.sleep(3600)
        keys, self.keys = self.keys, []
        return {key: float(key % 2) for key in keys}

    def close(self):
        pass

@batched_reward(low=0.0, high=1.0)
def hanging():
    return Scorer()
"""


@pytest.mark.long
def test_a_score_that_hangs_is_named_although_two_ranks_wait_with_collectives(
    server: RunningServer, tmp_path: Path
) -> None:
    (tmp_path / "hanging.py").write_text(HANGING_REWARD)
    own = (
        "data.eval=null",
        "run.world_size=2",
        f"reward.terms=[{{name: '{tmp_path / 'hanging.py'}:hanging'}}]",
        "guard.phase_limits={rollout: 10}",
        "train.steps=400",
    )
    kept = [key for key in arguments(server, tmp_path / "run") if not key.startswith(("evaluation.", "data.eval="))]
    with running_job([*kept, *own], tmp_path / "log") as job:
        assert job.wait(240) == 1
    shown = (tmp_path / "log.err").read_text()
    found = re.search(r"rank 0 .*no progress for (\d+) s in phase rollout, .*thread scoring$", shown, re.MULTILINE)
    assert found is not None, shown[-3000:]
    assert int(found[1]) <= 10 + 10
    assert shown.splitlines()[-1].endswith("rank 0 makes no progress; waiting for it: 1")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_kills_of_job_or_server_lose_no_prompt(tmp_path: Path) -> None:
    number = os.environ.get("CHAOS_NUMBER", "20")
    lines = disturb(tmp_path / "table", "--number", number, "--seed", "17", "--only", "async", seconds=3600)
    assert lines[-1] == f"{number} of {number} ended as the undisturbed run and left nothing behind"
