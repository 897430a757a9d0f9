"""`parallel.megatron`: fields are checked by name, type and owner, and reach the object that is built."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import grpo_mega.policy
from grpo_mega.config.policy_sections import Fp8Config, OptimizerConfig, ParallelConfig, PrecisionConfig
from grpo_mega.config.schema import Config
from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.models.spec import ModelSpec
from grpo_mega.policy.build import ddp_fields
from grpo_mega.policy.inspect.module_sizes import module_counter
from grpo_mega.policy.megatron_arguments import CLASSES, NOT_SUPPORTED, OWNED, split_arguments
from grpo_mega.policy.optimizer_config import optimizer_fields
from grpo_mega.policy.transformer_config import transformer_config, transformer_fields
from grpo_mega.types import UserError
from tests.helpers.family_configs import FAMILY_CONFIGS, raw_family_config
from tests.helpers.module_choices import LOCAL_ON_CPU

from megatron.core.transformer.enums import AttnBackend  # isort: skip - after policy prepares the import

ALL_KEYS = ParallelConfig(pp=2, vpp=2, recompute="selective", overlap_grad_reduce=True, overlap_param_gather=True)
PRECISIONS = [
    PrecisionConfig(dtype="fp32"),
    PrecisionConfig(fp8=Fp8Config(recipe="delayed", params=True)),
    PrecisionConfig(fp8=Fp8Config(recipe="blockwise", params=True, first_layers_bf16=1)),
]


def spec_of(family: str) -> ModelSpec:
    return spec_from_config(raw_family_config(family), "config.json")


def message_of(given: dict[str, Any]) -> str:
    with pytest.raises(UserError) as raised:
        split_arguments(given)
    return str(raised.value)


def config_attributes_set_in_policy() -> set[str]:
    """Return every x of an assignment `config.x = ...` in grpo_mega/policy."""
    found = set()
    for path in Path(grpo_mega.policy.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in (part for each in targets for part in ast.walk(each)):
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "config":
                    found.add(target.attr)
    return found


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: str(p.fp8 and p.fp8.recipe))
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_every_transformer_field_that_the_program_sets_is_owned(family: str, precision: PrecisionConfig) -> None:
    for parallel in (ALL_KEYS, ALL_KEYS.model_copy(update={"recompute": "full"})):
        assert not set(transformer_fields(spec_of(family), parallel, precision, LOCAL_ON_CPU)) - set(
            OWNED["transformer"]
        )


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: str(p.fp8 and p.fp8.recipe))
def test_every_ddp_and_optimizer_field_that_the_program_sets_is_owned(precision: PrecisionConfig) -> None:
    assert not set(ddp_fields(ALL_KEYS, precision)) - set(OWNED["ddp"])
    fields = optimizer_fields(OptimizerConfig(host_fraction=0.5), precision)
    assert not set(fields) - set(OWNED["optimizer"])


def test_every_field_that_is_assigned_after_construction_is_owned() -> None:
    declared = set(CLASSES["transformer"].__dataclass_fields__)
    assigned = config_attributes_set_in_policy() & declared
    assert {"finalize_model_grads_func", "no_sync_func"} <= assigned
    assert not assigned - set(OWNED["transformer"])


@pytest.mark.parametrize("section", CLASSES)
def test_the_tables_name_fields_of_megatron_once(section: str) -> None:
    declared = set(CLASSES[section].__dataclass_fields__)
    assert not set(OWNED[section]) - declared
    assert not set(NOT_SUPPORTED[section]) - declared
    assert not set(OWNED[section]) & set(NOT_SUPPORTED[section])


def test_every_owning_key_is_a_key_of_the_config() -> None:
    for key in {key for fields in OWNED.values() for key in fields.values()} - {""}:
        model: Any = Config
        for part in key.split("."):
            assert part in model.model_fields, key
            annotation = model.model_fields[part].annotation
            model = next((a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")), annotation)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"bucket_sise": 1}, ["bucket_sise=1", "TransformerConfig", "did you mean bucket_size?"]),
        ({"ddp.bucket_sise": 1}, ["megatron.ddp.bucket_sise=1", "did you mean ddp.bucket_size?"]),
        ({"ddp.moe_router_fusion": True}, ["DistributedDataParallelConfig", "did you mean transformer.moe_router_f"]),
        (
            {"tensor_parallel_size": 2},
            ["tensor_parallel_size=2", "did you mean tensor_model_parallel_size? parallel.tp"],
        ),
        ({"zzz_zzz": 2}, ["zzz_zzz=2", "remove parallel.megatron.zzz_zzz"]),
        ({"ddp.zzz_zzz": 2}, ["ddp.zzz_zzz=2", "remove parallel.megatron.ddp.zzz_zzz"]),
        ({"ddp.bucket_size": -1}, ["parallel.megatron.ddp.bucket_size=-1 must be at least 1", "DistributedDataP"]),
        ({"bucket_size": 0}, ["parallel.megatron.bucket_size=0 must be at least 1"]),
        ({"ddp": {"bucket_size": "many"}}, ["parallel.megatron.ddp.bucket_size='many'", "integer"]),
        ({"optimizer": {"lr": 1e-3}}, ["parallel.megatron.optimizer.lr=0.001", "set optimizer.lr"]),
        ({"ddp.nccl_ub": True}, ["parallel.megatron.ddp.nccl_ub=True is not", "remove parallel.megatron.ddp.nccl_ub"]),
        ({"ddp": 3}, ["parallel.megatron.ddp=3", "must hold a mapping", "write parallel.megatron.ddp.FIELD"]),
        ({"cp_comm_type": "fast"}, ["cp_comm_type='fast' must be one of p2p, all_gather, a2a"]),
        ({"cp_comm_type": ["p2p", "a2a+p2p"]}, ["cp_comm_type=['p2p', 'a2a+p2p'] must be one of"]),
        (
            {"bucket_size": 5, "ddp.bucket_size": 6},
            ["ddp.bucket_size=6", "parallel.megatron.bucket_size sets the same", "remove one of the two"],
        ),
        (
            {"ddp": {"bucket_size": 5}, "ddp.bucket_size": 6},
            ["ddp.bucket_size=6", "parallel.megatron.ddp.bucket_size sets the same", "remove one of the two"],
        ),
        ({"tensor_model_parallel_size": 2}, ["tensor_model_parallel_size=2", "set parallel.tp"]),
        ({"lr": 1e-3}, ["lr=0.001", "set optimizer.lr"]),
        ({"hidden_size": 8}, ["hidden_size=8", "set model.path"]),
        ({"calculate_per_token_loss": False}, ["calculate_per_token_loss=False", "remove"]),
        ({"fp16": True}, ["fp16=True", "set precision.dtype"]),
        ({"moe_z_loss_coeff": 1e-3}, ["moe_z_loss_coeff=0.001 is not supported", "number of tokens"]),
        ({"moe_aux_loss_coeff": 1e-3}, ["moe_aux_loss_coeff=0.001", "set algorithm.aux_loss_coef"]),
        ({"cpu_offloading": True}, ["cpu_offloading=True is not supported", "planner"]),
        ({"bucket_size": "many"}, ["bucket_size='many'", "integer"]),
        ({"moe_router_fusion": 1}, ["moe_router_fusion=1", "boolean"]),
        ({"attention_backend": "fast"}, ["attention_backend='fast'", "'flash'"]),
        (
            {"barrier_with_L1_time": False},
            ["barrier_with_L1_time", "write transformer.barrier_with_L1_time or optimizer.barrier_with_L1_time"],
        ),
        ({"optim.lr": 1.0}, ["'optim' is not a prefix", "optimizer."]),
    ],
    ids=str,
)
def test_a_field_that_cannot_be_passed_is_an_error_with_its_remedy(given: dict[str, Any], parts: list[str]) -> None:
    message = message_of(given)
    assert message.startswith("parallel.megatron.")
    for part in parts:
        assert part in message


def test_fields_are_split_by_class_with_a_prefix_a_nested_mapping_or_neither() -> None:
    found = split_arguments(
        {
            "attention_backend": "flash",
            "bucket_size": 1000,
            "optimizer.barrier_with_L1_time": False,
            "ddp": {"check_for_nan_in_grad": True},
        }
    )
    assert found.transformer == {"attention_backend": AttnBackend.flash}
    assert found.ddp == {"bucket_size": 1000, "check_for_nan_in_grad": True}
    assert found.optimizer == {"barrier_with_L1_time": False}


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_transformer_field_reaches_the_config_that_is_built(family: str) -> None:
    precision = PrecisionConfig(dtype="fp32")
    for passed in (True, False):
        parallel = ParallelConfig(megatron={"clone_scatter_output_in_embedding": passed})
        config = transformer_config(spec_of(family), parallel, precision, LOCAL_ON_CPU)
        assert config.clone_scatter_output_in_embedding is passed


def test_a_combination_that_megatron_rejects_names_the_config_key() -> None:
    parallel = ParallelConfig(megatron={"overlap_p2p_comm_warmup_flush": True})
    with pytest.raises(UserError, match=r"^parallel\.megatron=\{'overlap_p2p_comm_warmup_flush': True\}: Megatron"):
        transformer_config(spec_of("llama"), parallel, PrecisionConfig(dtype="fp32"), LOCAL_ON_CPU)


def test_the_planner_counts_the_modules_that_these_fields_give(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("qwen3")
    plain = module_counter(spec)(tp=1, ep=1, etp=1)
    assert module_counter(spec, {"attention_softmax_in_fp32": False})(tp=1, ep=1, etp=1) == plain
    owned = {name: key for name, key in OWNED["transformer"].items() if name != "add_bias_linear"}
    monkeypatch.setitem(OWNED, "transformer", owned)  # type: ignore[arg-type]
    biased = module_counter(spec, {"add_bias_linear": True})(tp=1, ep=1, etp=1)
    assert len(biased.dense_layer) > len(plain.dense_layer)
