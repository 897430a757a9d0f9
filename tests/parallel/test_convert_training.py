"""A training checkpoint of any layout is converted to the policy's weights without process groups or a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from grpo_mega.convert.compare import compare, open_checkpoint
from grpo_mega.convert.megatron_to_hf import megatron_to_hf
from tests.helpers.family_checkpoints import make_published
from tests.helpers.family_configs import FAMILY_CONFIGS
from tests.helpers.recorded_rollouts import LOSS as TOKEN_LOSS
from tests.helpers.recorded_rollouts import (
    ONE,
    Layout,
    Recorded,
    as_array,
    make_rows,
    open_policy,
    sample_groups,
    with_recorded,
)
from tests.parallel.conftest import Laboratory


def train_and_save(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> dict[str, bytes]:
    """Run one update, save a checkpoint, and return every Hugging Face tensor."""
    policy = open_policy(rank, recorded, layout)
    policy.update(with_recorded(make_rows(rank, recorded, layout), recorded).microbatches, TOKEN_LOSS, 1e-3)
    policy.save(folder, {"step": 1})
    return {name: as_array(tensor).tobytes() for name, tensor in policy.full_tensors(1 << 20)}


@pytest.mark.parametrize(("name", "layout"), [("qwen3", Layout(4, tp=2, pp=2)), ("qwen3-tied", ONE)], ids=str)
def test_a_training_checkpoint_converts_to_weights_bit_equal_to_the_policy(
    laboratory: Laboratory, tmp_path: Path, name: str, layout: Layout
) -> None:
    recorded = laboratory.recorded(name)
    step = tmp_path / "run" / "checkpoints" / "step_000001"
    step.mkdir(parents=True)
    wanted = laboratory.pool.call(layout.world, train_and_save, recorded, layout, step)[0]
    (tmp_path / "run" / "config.yaml").write_text(f"model:\n  path: {recorded.model}\n")
    megatron_to_hf(step, tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert {n: t.numpy().tobytes() for n, t in found.items()} == wanted
    sides = open_checkpoint(step, None, tmp_path / "hf"), open_checkpoint(tmp_path / "hf", None, step)
    assert {c.verdict for c in compare(*sides)} == {"equal"}
    base = open_checkpoint(recorded.model, None, step)
    assert "value" in {c.verdict for c in compare(sides[0], base)}, "the update changed nothing"


def load_and_save(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> None:
    """Load, run an update with learning rate 0 (it creates optimizer state and keeps the weights), and save."""
    policy = open_policy(rank, recorded, layout)
    policy.update(with_recorded(make_rows(rank, recorded, layout), recorded).microbatches, TOKEN_LOSS, 0.0)
    policy.save(folder, {"step": 1})


TWO_LAYOUTS = {
    "dense": (Layout(2, tp=2), Layout(4, pp=2)),
    "experts": (Layout(4, tp=2, pp=2, sequence_parallel=True, ep=2), Layout(4, cp=2, ep=2, etp=2)),
}
FAMILIES_IN_LAYOUTS = [
    pytest.param(family, layout, id=f"{family}-{layout}", marks=() if family == "deepseek_v3" else pytest.mark.long)
    for family in FAMILY_CONFIGS
    for layout in TWO_LAYOUTS["dense" if family in ("llama", "qwen2", "qwen3") else "experts"]
]


@pytest.mark.parametrize(("family", "layout"), FAMILIES_IN_LAYOUTS)
def test_weights_loaded_and_saved_by_a_layout_convert_back_bit_for_bit(
    laboratory: Laboratory, tmp_path: Path, family: str, layout: Layout
) -> None:
    hf = make_published(tmp_path / "hf", family)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    save_file({n: t.float() for n, t in load_file(hf / "model.safetensors").items()}, hf / "model.safetensors")
    (tmp_path / "saved").mkdir()
    groups, rewards = sample_groups(2, 2, 0)
    old = [[-3.0] * len(rollout.token_ids) for rollout in (r.completion for r in groups.rollouts)]
    laboratory.pool.call(
        layout.world, load_and_save, Recorded(hf, groups, rewards, old, old), layout, tmp_path / "saved"
    )
    megatron_to_hf(tmp_path / "saved", tmp_path / "back", base=hf)
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", hf))
    assert {n: t.numpy().tobytes() for n, t in found.items()} == {n: t.numpy().tobytes() for n, t in wanted.items()}
