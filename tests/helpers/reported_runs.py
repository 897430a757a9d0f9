"""Run folders for tests of the report and of `watch`, written as a run writes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.step_columns import write_step

HOSTILE = "</script><script>window.attacked = 1</script><!-- \x1b[2J\x1b]0;title\x07 \ud800 &amp; \u2028 \u202e"
"""A completion that tries to run a script, to control a terminal, and to break the encoding."""


def metrics_line(step: int) -> dict[str, Any]:
    """Return one line of metrics.jsonl of a run that learns."""
    progress = 1 - math.exp(-step / 20)
    return {
        "step": step,
        "reward/mean": 0.3 + 0.6 * progress,
        "reward/accuracy": 0.3 + 0.6 * progress,
        "reward/component/exact": 0.3 + 0.6 * progress,
        "rollout/length_mean": 20.0,
        "train/entropy": 1.0 - 0.5 * progress,
        "train/mismatch_max": 1e-4 * (1 + step % 7),
        "time/step_seconds": 2.0 + 0.1 * (step % 3),
        "time/rollout_seconds": 1.0,
        "host/cpu_utilization_mean": 0.5,
    }


def rollout(step: int, prompt: int, member: int, text: str = "The answer is 4.", num_tokens: int = 6) -> dict[str, Any]:
    """Return one row of the rollouts."""
    right = (prompt + member) % 2
    return {
        "group": prompt,
        "member": member,
        "prompt": f"prompt {prompt} of step {step}: 2 + 2 =",
        "completion": text,
        "answer": "4",
        "reward": float(right),
        "reward_components": {"exact": float(right)},
        "reward_failures": [],
        "advantage": 1.0 if right else -1.0,
        "stop_reason": "eos" if right else "length",
        "policy_version": step,
        "prompt_index": 1000 * step + prompt,
        "replica": 0,
        "prompt_ids": [1, 2, 3],
        "completion_ids": list(range(2, 2 + num_tokens)),
        "sampler_log_probs": [-1.0] * num_tokens,
        "old_log_probs": [-1.0 - 1e-3 * (step == 3 and prompt == 1 and i == 2) for i in range(num_tokens)],
        "loss_mask": None,
        "num_turns": 1,
        "steps": None,
        "data_set": "easy" if prompt % 2 else "hard",
    }


def write_run(
    folder: Path, steps: int = 6, groups: int = 4, members: int = 4, text: str = "The answer is 4.", num_tokens: int = 6
) -> Path:
    """Write the folder of a run that is done."""
    folder.mkdir(parents=True)
    config = {"model": {"path": "org/model"}, "sampling": {"group_size": members, "temperature": 1.0},
              "data": {"train": "train.jsonl", "prompts_per_step": groups}, "reward": {"terms": [{"name": "exact"}]},
              "train": {"steps": steps}}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(metrics_line(s)) + "\n" for s in range(1, steps + 1)))
    spans = [["rollout", 0.0, 1.0], ["train", 1.0, 0.8], ["sync", 1.8, 0.1]]
    lines = [
        {"step": s, "started": 0.0, "hosts": {"0": "a", "1": "a"}, "ranks": {"0": spans, "1": spans}}
        for s in range(1, steps + 1)
    ]
    (folder / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    numbers = {"reward_mean": 0.3, "length_mean": 20.0, "num_prompts": 100}
    summary = {"status": "done", "steps": steps, "eval_before": {"accuracy": 0.3, **numbers},
               "eval_after": {"accuracy": 0.9, **numbers}, "seconds": {"train": 5.0, "total": 12.0},
               "layout": {"tp": 1}, "versions": {"torch": "2.13.0", "sglang": None},
               "policy_digest": "0" * 16, "error": None,
               "verdict": "learned: held-out accuracy 0.300 -> 0.900", "alarms": []}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    for step in range(1, steps + 1):
        rows = [rollout(step, p, m, text, num_tokens) for p in range(groups) for m in range(members)]
        write_step(folder, step, rows[::2], rows[1::2])
    checkpoint = folder / "checkpoints" / f"step_{steps:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete").touch()
    (folder / "checkpoints" / f"step_{steps + 1:06d}").mkdir()
    return folder
