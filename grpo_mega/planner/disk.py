"""Bytes that a run writes to its run folder: checkpoints, the export, and the rollout files.

A rollout file has one JSON object per rollout (observe/rollouts.py): text and token ids of prompt and completion, and
one log-prob per token of the completion from the engine and, where it is known, from the policy. The bytes per token
are those of the JSON text of such values. Metrics and logs, some kilobytes a step, are not counted.
Pure arithmetic. Asserted by tests/unit/planner/test_disk.py and, against a run, by tests/e2e/test_quickstart.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mega.data.expert_records import NO_RECORD_UINT8
from grpo_mega.models.spec import ModelSpec
from grpo_mega.planner.inputs import PlanInputs

LOG_PROB_BYTES = 22.0
"""JSON text of a float32 log-prob: sign, 17 to 19 significant digits, decimal point, comma and space."""
ROW_BYTES = 370.0
"""JSON text of a rollout without tokens: the keys, the reward and its components, the advantage, the counters."""


@dataclass(frozen=True)
class DiskPlan:
    """Bytes of a run folder."""

    checkpoint: float
    """One checkpoint: weights, master weights and both moments, and those of the critic."""
    checkpoints: float
    """The kept checkpoints, and the one that is written before the oldest is deleted."""
    export: float
    """The last checkpoint in Hugging Face format; 0 without `checkpoint.export_hf`."""
    rollouts_per_step: float
    rollouts: float
    """The rollout files of all steps."""

    @property
    def run(self) -> float:
        """All files of the run, while the last checkpoint is written."""
        return self.checkpoints + self.export + self.rollouts

    def as_json(self) -> dict[str, int]:
        """Return the entry `disk_bytes` of `tools/plan.py --json`."""
        return {
            "checkpoint": round(self.checkpoint),
            "checkpoints": round(self.checkpoints),
            "export": round(self.export),
            "rollouts_per_step": round(self.rollouts_per_step),
            "rollouts": round(self.rollouts),
            "run": round(self.run),
        }


def plan_disk(inputs: PlanInputs, *, checkpoint: float, total_parameters: int) -> DiskPlan:
    """Return the bytes that the run writes.

    Args:
        inputs: the run.
        checkpoint: bytes of one checkpoint.
        total_parameters: of the whole model.
    """
    config = inputs.config
    steps, every = config.train.steps, config.checkpoint.every
    written = 1 if every is None else steps // every + (steps % every > 0)
    per_step = rollout_file_bytes(inputs)
    return DiskPlan(
        checkpoint=checkpoint,
        checkpoints=checkpoint * min(written, config.checkpoint.keep + 1),
        export=float(total_parameters * inputs.itemsize) if config.checkpoint.export_hf else 0.0,
        rollouts_per_step=per_step,
        rollouts=per_step * steps,
    )


def rollout_file_bytes(inputs: PlanInputs) -> float:
    """Return the bytes of the rollout files of one step, for rollouts of the assumed mean length.

    Supervised fine-tuning has none.
    """
    config, assumed, work = inputs.config, inputs.assumptions, inputs.workload
    if config.is_sft:
        return 0.0
    prompt = config.data.max_prompt_tokens * assumed.mean_length
    completion = config.sampling.max_tokens * assumed.mean_length
    token = len(str(inputs.spec.vocab_size)) + 2 + assumed.text_bytes_per_token
    log_probs = LOG_PROB_BYTES * (1 if config.algorithm.old_log_probs == "sampler" else 2)
    row = ROW_BYTES + (prompt + completion) * token + completion * log_probs
    if config.algorithm.routing_replay and inputs.spec.moe is not None:
        row += (prompt + completion) * _record_bytes(inputs.spec)
    return work.rollouts * row


def _record_bytes(spec: ModelSpec) -> int:
    """Return the bytes of the routing record of one token (data/expert_records.py)."""
    assert spec.moe is not None
    per_choice = 1 if spec.moe.num_experts <= NO_RECORD_UINT8 else 2
    return int(spec.num_layers * spec.moe.top_k * per_choice)
