"""Bytes of a run folder: rollout files as they are written, kept checkpoints, and the export."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_mega.observe.rollouts import RolloutRow, write_rollouts
from grpo_mega.planner.disk import plan_disk, rollout_file_bytes
from grpo_mega.planner.phase_memory import plan_memory
from tests.helpers.planner_cases import SIZES, config_of, inputs_of, spec_of

VOCABULARY = 151_936


def written_rows(number: int, prompt: int, completion: int, *, with_old: bool) -> list[RolloutRow]:
    """Rollouts as a run writes them: log-probs of float32 as Python floats, four bytes of text per token."""
    draw = random.Random(0)

    def log_probs() -> list[float]:
        return [float(np.float32(np.log(draw.uniform(1e-3, 1.0)))) for _ in range(completion)]

    return [
        RolloutRow(
            prompt="word" * prompt,
            completion="word" * completion,
            answer="42",
            reward=1.0,
            reward_components={"exact": 1.0},
            reward_failures=[],
            advantage=0.7071067690849304,
            stop_reason="eos",
            policy_version=12,
            prompt_index=1234,
            replica=0,
            prompt_ids=[draw.randrange(10_000, VOCABULARY) for _ in range(prompt)],
            completion_ids=[draw.randrange(10_000, VOCABULARY) for _ in range(completion)],
            sampler_log_probs=log_probs(),
            old_log_probs=log_probs() if with_old else None,
            loss_mask=None,
            num_turns=1,
            steps=None,
            data_set="train",
        )
        for _ in range(number)
    ]


@pytest.mark.parametrize("old_log_probs", ["policy", "sampler"])
@pytest.mark.parametrize(("prompt", "completion"), [(64, 512), (8, 8)])
def test_a_rollout_file_has_the_planned_size(tmp_path: Path, old_log_probs: Any, prompt: int, completion: int) -> None:
    config = config_of(
        sampling={"max_tokens": 2 * completion, "group_size": 4},
        data={"max_prompt_tokens": 2 * prompt, "prompts_per_step": 4},
        algorithm={"old_log_probs": old_log_probs},
        train={"max_tokens_per_microbatch": 4096},
    )
    inputs = inputs_of(config, spec_of(vocab_size=VOCABULARY))
    path = tmp_path / "step_000001.jsonl"
    write_rollouts(path, written_rows(16, prompt, completion, with_old=old_log_probs == "policy"))
    assert rollout_file_bytes(inputs) == pytest.approx(path.stat().st_size, rel=0.1)


def test_routing_records_have_a_byte_per_layer_and_chosen_expert() -> None:
    spec = spec_of("qwen3_moe")
    assert spec.moe is not None
    without, with_records = (
        rollout_file_bytes(inputs_of(config_of(algorithm={"routing_replay": on}), spec)) for on in (False, True)
    )
    tokens = 8 * 4 * (32 + 32)  # rollouts of half of 64 + 64 tokens
    assert with_records - without == tokens * spec.num_layers * spec.moe.top_k


@pytest.mark.parametrize(("dtype", "written"), [("fp32", 12_914_921), ("bf16", 11_331_561)])
def test_a_checkpoint_has_the_bytes_that_the_quickstart_wrote(dtype: Any, written: int) -> None:
    """The tensor file of 791,680 parameters also holds the headers of its entries."""
    inputs = inputs_of(config_of(precision={"dtype": dtype}), gpu="cpu")
    memory = plan_memory(inputs, SIZES, total_parameters=791_680, where="config.json")
    assert memory.checkpoint == pytest.approx(written, rel=0.03)


@pytest.mark.parametrize(
    ("every", "keep", "steps", "stored"),
    [(None, 2, 10, 1), (5, 2, 10, 2), (1, 2, 10, 3), (4, 3, 10, 3), (20, 1, 10, 1)],
    ids=["only-the-last", "two", "kept-and-the-next", "last-step-too", "every-after-the-end"],
)
def test_checkpoints_are_those_that_are_kept_and_the_one_being_written(
    every: int | None, keep: int, steps: int, stored: int
) -> None:
    config = config_of(train={"steps": steps}, checkpoint={"every": every, "keep": keep})
    disk = plan_disk(inputs_of(config), checkpoint=100.0, total_parameters=10)
    assert disk.checkpoints == stored * 100
    assert disk.rollouts == steps * disk.rollouts_per_step
    assert disk.export == 10 * inputs_of(config).itemsize
    assert disk.run == disk.checkpoints + disk.export + disk.rollouts
    off = plan_disk(inputs_of(config_of(checkpoint={"export_hf": False})), checkpoint=100.0, total_parameters=10)
    assert off.export == 0
