"""A whole job with everything that reads or writes state: each part is on the device in its phases only.

Reading a part in a wrong phase ends the process: its memory is freed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.family_configs import raw_family_config
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


@pytest.mark.timeout(600)
@pytest.mark.parametrize("keys", RUNS)
def test_all_state_is_read_while_it_is_on_the_device_and_copies_give_the_same_run(
    tmp_path: Path, keys: tuple[str, ...]
) -> None:
    """The second run keeps copies on the host, as CUDA devices do; the first moves its memory."""
    model = make_family_model(tmp_path / "moe", raw_family_config("qwen3_moe"), router_scale=0.05)
    runs = {"moved": "tests.helpers.plain_rewards:digits", "copied": "tests.helpers.copied_phases:digits"}
    for name, reward in runs.items():
        own = (f"model.path={model}", f"reward.terms=[{{name: {reward}}}]", f"run.dir={tmp_path / name}")
        run_job_successfully(*SMALL, *EVERYTHING, *keys, *own, output=tmp_path / f"{name}.log", timeout_seconds=280)
    moved, copied = (
        [without_times(line) for line in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("moved", "copied")
    )
    assert len(moved) == STEPS
    assert moved == copied
    assert all("eval/accuracy" in line for line in moved[:-1])
    assert all(line["train/ref_kl"] >= 0 for line in moved if "train/ref_kl" in line)
    digests = [read_json(tmp_path / name / "summary.json")["policy_digest"] for name in ("moved", "copied")]
    assert digests[0] == digests[1]
    exported = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("moved", "copied")]
    assert exported[0] == exported[1]
