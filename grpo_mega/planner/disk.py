"""Bytes that a run writes to its run folder: checkpoints, the export, and the rollout files.

The rollout files of a step are compressed columns (observe/rollout_files/): token ids and texts of prompts and
completions, and one log-prob per token of the completion from the engine and, where it is known, from the policy. The
rollouts of a group have the same prompt, which takes its bytes once. Token ids count with the entropy of equally
frequent tokens, so the estimate is high for texts of a language. Metrics and logs, some kilobytes a step, are not
counted.
Pure arithmetic. Asserted by tests/unit/planner/test_disk.py and, against a run, by tests/e2e/test_quickstart.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_mega.config.schema import SampledRollouts
from grpo_mega.data.expert_records import NO_RECORD_UINT8
from grpo_mega.models.spec import ModelSpec
from grpo_mega.planner.inputs import PlanInputs

LOG_PROB_BYTES = 3.6
"""Compressed float32 log-prob: the sign and the exponent take half a byte, the mantissa is not compressible."""
MISMATCH_BYTES = 1.2
"""Compressed log-prob of the policy, as a rounded difference from the engine's."""
TEXT_RATIO = 0.45
"""Compressed bytes per byte of text."""
ROW_BYTES = 6.0
"""Compressed rollout without tokens: reward, advantage and counters."""
PART_BYTES = 8600.0
"""A part without rollouts: metadata of all columns."""


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
    mode = config.observe.rollouts
    if config.is_sft or mode == "none":
        return 0.0
    prompt = config.data.max_prompt_tokens * assumed.mean_length
    completion = config.sampling.max_tokens * assumed.mean_length
    token = math.log2(inputs.spec.vocab_size) / 8 + assumed.text_bytes_per_token * TEXT_RATIO
    log_probs = LOG_PROB_BYTES + (0.0 if config.algorithm.old_log_probs == "sampler" else MISMATCH_BYTES)
    row = ROW_BYTES + completion * (token + log_probs) + prompt * token / config.sampling.group_size
    if config.algorithm.routing_replay and inputs.spec.moe is not None:
        row += (prompt + completion) * _record_bytes(inputs.spec)
    groups = config.data.prompts_per_step
    written = min(1.0, mode.sample / groups) if isinstance(mode, SampledRollouts) else 1.0
    return inputs.topology.num_replicas * PART_BYTES + work.rollouts * written * row


def _record_bytes(spec: ModelSpec) -> int:
    """Return the bytes of the routing record of one token (data/expert_records.py)."""
    assert spec.moe is not None
    per_choice = 1 if spec.moe.num_experts <= NO_RECORD_UINT8 else 2
    return int(spec.num_layers * spec.moe.top_k * per_choice)
