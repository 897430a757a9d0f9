"""Every family is converted to Megatron's format and back bit for bit, with FP8 blocks and multi-token prediction."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_mega.convert.hf_to_megatron import hf_to_megatron
from grpo_mega.convert.megatron_to_hf import megatron_to_hf
from grpo_mega.models.digest import digest_text, slice_digest
from grpo_mega.quantization import block_fp8
from grpo_mega.types import TensorSlice, UserError
from tests.helpers.checkpoint_checks import assert_same_tensors, hf_logits, read_tensors, run_stock
from tests.helpers.family_checkpoints import make_published
from tests.helpers.family_configs import FAMILY_CONFIGS, raw_family_config
from tests.helpers.tiny_models import make_family_model

# tp, pp, ep; and the config with which Megatron's group-limited router (topk // group_topk best experts) equals the
# router of the family
STOCK = {
    "llama": (2, 2, 1, {}),
    "qwen2": (1, 2, 1, {}),
    "qwen3": (2, 1, 1, {}),
    "qwen3_moe": (1, 2, 2, {}),
    "mixtral": (1, 1, 2, {}),
    "deepseek_v2": (1, 2, 1, {"num_experts_per_tok": 2}),
    "deepseek_v3": (1, 2, 2, {"num_experts_per_tok": 4}),
    "glm4_moe": (1, 1, 2, {"num_experts_per_tok": 4}),
}


def digests_of(folder: Path) -> dict[str, str]:
    """Return the digests of the tensors; FP8 weights are dequantized first."""
    tensors, found = read_tensors(folder), {}
    for name, tensor in tensors.items():
        scales = tensors.get(name + block_fp8.SCALE_SUFFIX)
        values = tensor if scales is None else block_fp8.dequantize(tensor, scales)
        if not name.endswith(block_fp8.SCALE):
            found[name] = digest_text(slice_digest(values, TensorSlice(name, (0,) * values.dim(), tuple(values.shape))))
    return found


@pytest.mark.parametrize("quantized", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_every_family_is_restored_bit_for_bit_with_the_same_digests(
    tmp_path: Path, family: str, quantized: bool
) -> None:
    sizes = {"intermediate_size": 200, "moe_intermediate_size": 136} if quantized else {}
    known = raw_family_config(family)
    hf = make_published(tmp_path / "hf", family, quantized=quantized, **{k: v for k, v in sizes.items() if k in known})
    assert any(t.dtype == block_fp8.FP8_DTYPE for t in read_tensors(hf).values()) == quantized
    hf_to_megatron(hf, tmp_path / "megatron", file_bytes=200_000)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", to_fp8=quantized, shard_bytes=300_000)
    assert_same_tensors(tmp_path / "back", hf)
    for side in ("megatron", "back"):
        assert json.loads((tmp_path / side / "digests.json").read_text()) == digests_of(hf)


@pytest.mark.long  # test_convert_tools.py has a stock Megatron with Qwen2; the test above has every family's tensors
@pytest.mark.parametrize("family", STOCK)
def test_a_stock_megatron_loads_every_family_at_another_layout(tmp_path: Path, family: str) -> None:
    tp, pp, ep, changes = STOCK[family]
    hf = make_family_model(tmp_path / "hf", raw_family_config(family, **changes))
    hf_to_megatron(hf, tmp_path / "megatron")
    found = run_stock("load", hf / "config.json", tmp_path / "megatron" / "release", tmp_path / "logits", tp, pp, ep)
    assert float((found - hf_logits(hf)).abs().max()) <= 2e-5
    megatron_to_hf(tmp_path / "logits.again", tmp_path / "back", base=hf)
    assert_same_tensors(tmp_path / "back", hf)


def test_tensors_that_a_run_does_not_train_are_copied_from_the_base(tmp_path: Path) -> None:
    hf = make_published(tmp_path / "hf", "glm4_moe", quantized=True)
    mtp = re.compile(r"model\.layers\.2\.")
    without = tmp_path / "without"
    make_published(without, "glm4_moe", quantized=True)
    tensors = {name: tensor for name, tensor in read_tensors(without).items() if not mtp.match(name)}
    save_file(tensors, without / "model.safetensors")
    hf_to_megatron(without, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", base=hf, to_fp8=True)
    assert_same_tensors(tmp_path / "back", hf)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "alone", to_fp8=True)
    assert_same_tensors(tmp_path / "alone", without)


def test_an_incomplete_multi_token_prediction_layer_is_rejected(tmp_path: Path) -> None:
    hf = make_published(tmp_path / "hf", "deepseek_v3")
    tensors = load_file(hf / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    save_file(tensors, hf / "model.safetensors")
    rule = r"model\.layers\.2\.mlp\.experts\.3\.up_proj\.weight of shape \(32, 64\) is missing, .*gate_proj.* exists"
    with pytest.raises(UserError, match=rule):
        hf_to_megatron(hf, tmp_path / "megatron")


def test_the_correction_bias_stays_float32_for_every_requested_dtype(tmp_path: Path) -> None:
    hf = make_published(tmp_path / "hf", "deepseek_v3")
    hf_to_megatron(hf, tmp_path / "megatron", dtype="fp16")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype="bf16")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(read_tensors(tmp_path / "back")[bias], read_tensors(hf)[bias])
    assert read_tensors(tmp_path / "back")["model.norm.weight"].dtype == torch.bfloat16
