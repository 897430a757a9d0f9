"""policy/fp8.py: fields that it sets exist in Megatron, and FP8 parameters convert from and to values."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_mega.config.policy_sections import Fp8Config, PrecisionConfig
from grpo_mega.policy import fp8
from grpo_mega.policy.learner import MegatronLearner

from megatron.core.distributed import DistributedDataParallelConfig  # isort: skip - after policy prepares the import
from megatron.core.enums import Fp8Recipe  # isort: skip
from megatron.core.optimizer import OptimizerConfig  # isort: skip
from megatron.core.transformer import TransformerConfig  # isort: skip


def fp8_precision(recipe: str, **keys: Any) -> PrecisionConfig:
    return PrecisionConfig(dtype="bf16", fp8=Fp8Config.model_validate({"recipe": recipe, **keys}))


def test_without_fp8_nothing_is_set() -> None:
    none = PrecisionConfig(dtype="bf16")
    assert fp8.transformer_fields(none, has_experts=True) == {}
    assert fp8.ddp_fields(none) == fp8.optimizer_fields(none) == {}


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_megatron_has_every_recipe_and_field(recipe: str) -> None:
    extra = {} if recipe == "delayed" else {"first_layers_bf16": 1, "last_layers_bf16": 2}
    wanted = fp8_precision(recipe, params=True, **extra)
    fields = fp8.transformer_fields(wanted, has_experts=False)
    config = TransformerConfig(num_layers=8, hidden_size=64, num_attention_heads=4, bf16=True, **fields)
    assert config.fp8_recipe == Fp8Recipe(recipe)
    assert config.fp8_param
    assert config.first_last_layers_bf16 == bool(extra)
    if extra:
        assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 2)
    assert DistributedDataParallelConfig(use_distributed_optimizer=True, **fp8.ddp_fields(wanted)).fp8_param_gather
    assert OptimizerConfig(**fp8.optimizer_fields(wanted)).fp8_recipe == recipe


def test_formats_and_history() -> None:
    assert fp8.transformer_fields(fp8_precision("delayed"), has_experts=False) == {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_param": False,
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    }
    assert fp8.transformer_fields(fp8_precision("blockwise"), has_experts=False)["fp8"] == "e4m3"
    assert fp8.transformer_fields(fp8_precision("blockwise", format="hybrid"), has_experts=False)["fp8"] == "hybrid"


def test_experts_get_tokens_in_multiples() -> None:
    fields = fp8.transformer_fields(fp8_precision("blockwise"), has_experts=True)
    assert fields["moe_router_padding_for_quantization"] is True
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert set(fields) <= names


class Fp8Parameter:
    """Behaves like an FP8 tensor of Transformer Engine: indexing returns a copy, and values copied in are rounded."""

    shape = torch.Size([4])
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.codes = torch.zeros(4, dtype=torch.float8_e4m3fn)

    def copy_(self, values: torch.Tensor) -> None:
        self.codes = values.to(torch.float8_e4m3fn)

    def dequantize(self) -> torch.Tensor:
        return self.codes.to(torch.bfloat16)


def test_values_are_written_to_an_fp8_parameter_whole_and_read_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8.fp8_utils, "is_float8tensor", lambda p: isinstance(p, Fp8Parameter))
    monkeypatch.setattr(fp8.fp8_utils, "dequantize_fp8_tensor", lambda p: p.dequantize())
    parameter: Any = Fp8Parameter()
    room = fp8.room_for(parameter)
    room[:2].copy_(torch.tensor([1.0, 1.06]))
    room[2:].copy_(torch.tensor([-2.0, 0.0]))
    fp8.put(room, parameter)
    assert fp8.values_of(parameter).tolist() == [1.0, 1.0, -2.0, 0.0]


def test_a_plain_parameter_is_filled_and_seen_in_place() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        room = fp8.room_for(parameter)
        assert room is parameter
        assert room.tolist() == [0.0, 0.0, 0.0]
        room[1] = 5.0
        fp8.put(room, parameter)
    assert fp8.values_of(parameter).data_ptr() == parameter.data_ptr()


def test_fp8_copies_are_freed_before_the_weights_leave_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = torch.nn.Linear(2, 2)
    layer._fp8_workspaces = {"weight": torch.zeros(2, 2)}
    copies_at_offload: list[int] = []
    learner: Any = object.__new__(MegatronLearner)
    monkeypatch.setattr(MegatronLearner, "_settle", lambda _: None)
    learner.parts = SimpleNamespace(models=[layer])
    learner.ranks = SimpleNamespace(device=torch.device("cpu"))
    learner._memory = SimpleNamespace(offload=lambda *_: copies_at_offload.append(len(layer._fp8_workspaces)))
    learner.offload("grads", "optimizer")
    learner.offload("params")
    assert copies_at_offload == [1, 0]
