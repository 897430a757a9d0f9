"""A checkpoint of a training run, of any layout, converts to the policy's weights without a rank or a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from grpo_mega.convert.compare import compare, open_checkpoint
from grpo_mega.convert.megatron_to_hf import megatron_to_hf
from tests.parallel.conftest import Laboratory
from tests.parallel.recorded import LOSS as TOKEN_LOSS
from tests.parallel.recorded import ONE, Layout, Recorded, as_array, make_rows, open_policy, with_recorded


def train_and_save(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> dict[str, bytes]:
    """One update; what every Hugging Face tensor then is."""
    policy = open_policy(rank, recorded, layout)
    policy.update(with_recorded(make_rows(rank, recorded, layout), recorded).microbatches, TOKEN_LOSS, 1e-3)
    policy.save(folder, {"step": 1})
    return {name: as_array(tensor).tobytes() for name, tensor in policy.full_tensors(1 << 20)}


@pytest.mark.parametrize(("name", "layout"), [("qwen3", Layout(4, tp=2, pp=2)), ("qwen3-tied", ONE)], ids=str)
def test_a_run_s_checkpoint_converts_to_the_policy_s_weights_bit_for_bit(
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
