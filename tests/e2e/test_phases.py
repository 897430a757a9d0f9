"""A whole job with everything that reads or writes state: each part is on the device in its phases only.

Reading a part in a wrong phase ends the process: its memory is freed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.family_configs import raw_family_config
from tests.helpers.finished_runs import Run
from tests.helpers.jobs import SMALL, read_json, read_lines, run_job_successfully, without_times
from tests.helpers.tiny_models import make_family_model

STEPS = 3
EVERYTHING = (
    "model.base=null",
    "data.template=plain",
    "data.eval=arithmetic:heldout",
    "evaluation.every=1",
    "evaluation.k=1",
    "evaluation.max_prompts=8",
    "sampling.max_tokens=8",
    "algorithm.kl_coef=0.01",
    "algorithm.ref_update_every=1",
    "algorithm.routing_replay=true",
    "train.epochs_per_rollout=2",
    f"train.steps={STEPS}",
    "checkpoint.every=1",
    "guard.max_mismatch=0.01",
)
CRITIC = "algorithm.name=ppo"
DYNAMIC_SAMPLING = "algorithm.degenerate=refill"  # not possible with a critic
RUNS = [
    pytest.param((CRITIC,), id="critic"),
    pytest.param((DYNAMIC_SAMPLING,), id="dynamic-sampling", marks=pytest.mark.long),
    pytest.param((CRITIC, "run.world_size=2", "engine.tp=1", "parallel.ep=2"), id="critic-ep2", marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "moe"
    return make_family_model(folder, raw_family_config("qwen3_moe"), router_scale=0.05)


@pytest.fixture(scope="module", params=RUNS)
def moved(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run that moves its memory to the host."""
    return run(tmp_path_factory.mktemp("moved") / "run", model, "tests.helpers.plain_rewards:digits", *request.param)


def run(folder: Path, model: Path, reward: str, *keys: str) -> Run:
    arguments = (*SMALL, *EVERYTHING, *keys, f"model.path={model}")
    own = (f"reward.terms=[{{name: {reward}}}]", f"run.dir={folder}")
    ended = run_job_successfully(*arguments, *own, output=folder.with_suffix(".log"), timeout_seconds=280)
    return Run(keys, folder, ended)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [without_times(line) for line in read_lines(folder / "metrics.jsonl")]


@pytest.mark.timeout(600)
def test_all_state_is_read_while_it_is_on_the_device(moved: Run) -> None:
    lines = metrics_of(moved.folder)
    assert len(lines) == STEPS
    assert all("eval/accuracy" in line for line in lines[:-1])
    assert all(line["train/ref_kl"] >= 0 for line in lines if "train/ref_kl" in line)


@pytest.mark.long  # tests/unit/policy/test_phase_offload.py and test_host_memory.py have the copies without a job
@pytest.mark.timeout(600)
def test_copies_on_the_host_as_on_cuda_give_the_same_run(moved: Run, model: Path, tmp_path: Path) -> None:
    copied = run(tmp_path / "copied", model, "tests.helpers.copied_phases:digits", *moved.arguments)
    folders = (moved.folder, copied.folder)
    assert metrics_of(moved.folder) == metrics_of(copied.folder)
    digests = [read_json(folder / "summary.json")["policy_digest"] for folder in folders]
    assert digests[0] == digests[1]
    exported = [(folder / "hf" / "model.safetensors").read_bytes() for folder in folders]
    assert exported[0] == exported[1]
