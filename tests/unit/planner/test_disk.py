"""Bytes of a run folder: rollout files as they are written, kept checkpoints, and the export."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_mega.observe.rollout_files.part_writer import part_path, write_part
from grpo_mega.planner.disk import PART_BYTES, plan_disk, rollout_file_bytes
from grpo_mega.planner.phase_memory import plan_memory
from tests.helpers.jobs import REPOSITORY
from tests.helpers.planner_cases import SIZES, config_of, inputs_of, spec_of
from tests.helpers.step_columns import columns_of

VOCABULARY = 151_936
ADVANTAGES = (-1.5, -0.87, 0.58, 0.87, 1.73)  # of rewards 0 and 1, there are few values


def written_part(folder: Path, groups: int, prompt: int, completion: int, *, with_old: bool) -> int:
    """Write rollouts as a run does: four bytes of English text per token, float32 log-probs, equally frequent tokens.

    Return the bytes of the file."""
    draw = random.Random(0)
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md")))

    def text(tokens: int) -> str:
        begin = draw.randrange(len(pages) - 4 * tokens)
        return pages[begin : begin + 4 * tokens]

    def ids(tokens: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(tokens)]

    def log_probs() -> list[float]:
        return [float(np.float32(np.log(draw.uniform(1e-3, 1.0)))) for _ in range(completion)]

    rows = []
    for group in range(groups):
        shared = {
            "group": group,
            "prompt_index": draw.randrange(10**4),
            "prompt": text(prompt),
            "prompt_ids": ids(prompt),
        }
        for member in range(4):
            own = {"member": member, "completion": text(completion), "completion_ids": ids(completion)}
            sampled = log_probs()
            old = [value * draw.gauss(1.0, 0.01) for value in sampled] if with_old else None
            own |= {"advantage": draw.choice(ADVANTAGES), "sampler_log_probs": sampled, "old_log_probs": old}
            rows.append(shared | own)
    write_part(folder, 0, 1, columns_of(*rows))
    return part_path(folder, 0).stat().st_size


@pytest.mark.parametrize("old_log_probs", ["policy", "sampler"])
@pytest.mark.parametrize(("prompt", "completion"), [(64, 512), (8, 8)])
def test_a_rollout_file_has_the_planned_size(tmp_path: Path, old_log_probs: Any, prompt: int, completion: int) -> None:
    config = config_of(
        sampling={"max_tokens": 2 * completion, "group_size": 4},
        data={"max_prompt_tokens": 2 * prompt, "prompts_per_step": 16},
        algorithm={"old_log_probs": old_log_probs},
        train={"max_tokens_per_microbatch": 4096},
    )
    inputs = inputs_of(config, spec_of(vocab_size=VOCABULARY))
    size = written_part(tmp_path, 16, prompt, completion, with_old=old_log_probs == "policy")
    assert rollout_file_bytes(inputs) == pytest.approx(size, rel=0.1)


def test_only_the_groups_that_are_written_count() -> None:
    every, some, none = (
        rollout_file_bytes(inputs_of(config_of(observe={"rollouts": mode}))) for mode in ("all", {"sample": 2}, "none")
    )
    parts = inputs_of(config_of()).topology.num_replicas * PART_BYTES
    assert some - parts == pytest.approx((every - parts) * 2 / config_of().data.prompts_per_step)
    assert none == 0


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
