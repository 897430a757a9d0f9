"""The layout must divide the model, and a rollout must fit its positions; each error has key, number and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.config.load import load_config
from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.config.schema import Config
from grpo_mega.doctor import model_rules
from grpo_mega.doctor.model_rules import check_model
from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.models.layout_rules import check_layout
from grpo_mega.parallel import devices
from grpo_mega.parallel.topology import Topology
from grpo_mega.policy.module_choice import ModuleChoice
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names
from tests.helpers.family_configs import raw_family_config

QUICKSTART = Path(__file__).resolve().parents[3] / "configs" / "quickstart.yaml"
SHAPE = "model.base.architecture."
RECIPE = "model.base.architecture"


def config_of(*overrides: str) -> Config:
    """Load the quickstart: 4 heads, 2 KV heads, ffn 384, 4 layers, 64 positions, prompts of 16 and completions of 8."""
    return load_config(QUICKSTART, overrides)


def message_of(config: Config, topology: Topology) -> str:
    with pytest.raises(UserError) as caught:
        check_model(config, topology)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "topology", "named"),
    [
        ((), Topology(3, tp=3), ("parallel.tp=3", "4 attention heads", RECIPE, "use one of 1, 2, 4")),
        ((), Topology(8, engine_tp=8), ("engine.tp=8", "4 attention heads", RECIPE, "use one of 1, 2, 4")),
        (
            (SHAPE + "ffn_size=9",),
            Topology(2, tp=2),
            ("parallel.tp=2", "9 feed-forward size", RECIPE, "use one of 1, 3, 9"),
        ),
        (
            (SHAPE + "ffn_size=10",),
            Topology(4, engine_tp=4),
            ("engine.tp=4", "10 feed-forward size", RECIPE, "use one of 1, 2, 5, 10"),
        ),
        ((), Topology(4, tp=4), ("parallel.tp=4", "2 key-value heads", RECIPE, "use one of 1, 2")),
        (
            ("parallel.pp=3",),
            Topology(3, pp=3),
            ("parallel.pp=3", "4 layers", RECIPE, "1, 2, 4", "parallel.num_layers_first_stage", "pipeline_layout"),
        ),
        (
            ("parallel.recompute=selective", "parallel.recompute_modules=[mlp, moe]"),
            Topology(1),
            ("parallel.recompute_modules", "moe", RECIPE, "no experts", "leave it out"),
        ),
        ((), Topology(2, ep=2), ("parallel.ep=2", RECIPE, "no experts", "leave it out")),
        (
            ("algorithm.routing_replay=true",),
            Topology(1),
            ("algorithm.routing_replay=true", RECIPE, "no experts", "leave it out"),
        ),
        (
            ("algorithm.router_bias_update_rate=0.001",),
            Topology(1),
            ("algorithm.router_bias_update_rate=0.001", RECIPE, "no experts", "leave it out"),
        ),
        (
            ("algorithm.aux_loss_coef=0.001",),
            Topology(1),
            ("algorithm.aux_loss_coef=0.001", RECIPE, "no experts", "leave it out"),
        ),
        (
            ("sampling.max_tokens=49",),
            Topology(1),
            ("data.max_prompt_tokens", "max_tokens", "65", "64 positions", RECIPE, "lower"),
        ),
        (
            ("evaluation.max_tokens=60",),
            Topology(1),
            ("data.max_prompt_tokens", "max_tokens", "76", "64 positions", RECIPE, "lower"),
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_rejected(
    overrides: tuple[str, ...], topology: Topology, named: tuple[str, ...]
) -> None:
    assert_names(message_of(config_of(*overrides), topology), *named)


@pytest.mark.parametrize(
    ("overrides", "topology"),
    [
        ((), Topology(1)),
        (("parallel.pp=3", "parallel.num_layers_first_stage=2"), Topology(3, pp=3)),
        ((), Topology(8, tp=2, pp=4, engine_tp=4)),  # an engine's ranks may share a key-value head
        (("sampling.max_tokens=48", "evaluation.max_tokens=48"), Topology(1)),
    ],
)
def test_settings_that_fit_the_model_are_accepted(overrides: tuple[str, ...], topology: Topology) -> None:
    check_model(config_of(*overrides), topology)


@pytest.mark.parametrize(("family", "accepted"), [("qwen3_moe", False), ("deepseek_v3", True), ("glm4_moe", True)])
def test_only_routers_with_a_correction_bias_can_move_it(tmp_path: Path, family: str, accepted: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw_family_config(family)))
    config = config_of("model.base=null", f"model.path={tmp_path}", "algorithm.router_bias_update_rate=0.001")
    if accepted:
        check_model(config, Topology(1), with_engine=False)
        return
    with pytest.raises(UserError) as caught:
        check_model(config, Topology(1), with_engine=False)
    named = ("algorithm.router_bias_update_rate=0.001", str(tmp_path), "without a correction bias", "leave it out")
    assert_names(str(caught.value), *named)


def test_sizes_of_a_checkpoint_are_read_from_its_config(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config = config_of("model.base=null", f"model.path={folder}")
    assert_names(message_of(config, Topology(1)), f"model.path={folder}", "not a folder", "Hugging Face model folder")
    folder.mkdir()
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 24,
        "intermediate_size": 12,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 10,
        "max_position_embeddings": 24,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    check_model(config_of("model.base=null", f"model.path={folder}", "parallel.pp=5"), Topology(15, 3, 5, engine_tp=3))
    message = message_of(config, Topology(2, tp=2))
    assert_names(message, "parallel.tp=2", "3 key-value heads", str(folder), "use one of 1, 3")
    message = message_of(config_of("model.base=null", f"model.path={folder}", "parallel.pp=2"), Topology(2, pp=2))
    assert_names(message, "parallel.pp=2", "5 layers", str(folder), "use one of 1, 5")


def family_config(tmp_path: Path, family: str, **changes: Any) -> Config:
    (tmp_path / "config.json").write_text(json.dumps(raw_family_config(family, **changes)))
    return load_config(QUICKSTART, ("model.base=null", f"model.path={tmp_path}"))


GPT_OSS: dict[str, Any] = {"rms_norm_eps": 1e-5, "swiglu_limit": 7.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"swiglu_limit": 0.5}, ["swiglu_limit=0.5", "7.0"]),
        ({"rms_norm_eps": 1e-6}, ["rms_norm_eps=1e-06", "1e-05"]),
        ({"swiglu_alpha": 1.0}, ["swiglu_alpha=1.0", "1.702"]),
        ({"layer_types": ["full_attention"] * 2}, ["layers with a window=[]", "[0]"]),
    ],
)
def test_configs_that_the_engine_computes_differently_are_rejected(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    message = message_of(family_config(tmp_path, "gpt_oss", **GPT_OSS | changes), Topology(1))
    assert_names(message, f"model.path={tmp_path}", *words, "use a model with")


@pytest.mark.parametrize("on_cuda", [False, True])
def test_sglang_supports_expert_parallelism_only_with_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cuda: bool
) -> None:
    monkeypatch.setattr(devices, "DRIVER_FOLDER", tmp_path if on_cuda else tmp_path / "nothing")
    config = family_config(tmp_path, "qwen3_moe", mlp_only_layers=[])
    precision = config.precision.model_copy(update={"dtype": "bf16"})
    for ep in (1, 2):
        engine = config.engine.model_copy(update={"kind": "sglang", "tp": 2, "ep": ep})
        changed = config.model_copy(update={"engine": engine, "precision": precision})
        if ep == 1 or on_cuda:
            check_model(changed, Topology(2, engine_tp=2))
        else:
            message = message_of(changed, Topology(2, engine_tp=2))
            assert_names(message, "engine.ep=2", "engine.kind=sglang", "CUDA", "use engine.ep=1")


def test_sglang_on_cuda_computes_in_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "DRIVER_FOLDER", tmp_path)
    config = family_config(tmp_path, "qwen3_moe", mlp_only_layers=[])
    sglang = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": "sglang"})})
    message = message_of(sglang, Topology(1))
    assert_names(
        message, "precision.dtype=fp32", "engine.kind=sglang", "CUDA", "precision.dtype=bf16", "engine.kind=vllm"
    )


def test_sglang_accepts_only_verified_families(tmp_path: Path) -> None:
    config = family_config(tmp_path, "deepseek_v3")
    sglang = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": "sglang"})})
    families = "llama, qwen2, qwen3, qwen3_moe, mixtral, glm4_moe"
    message = message_of(sglang, Topology(1))
    assert_names(message, "engine.kind=sglang", "deepseek_v3", str(tmp_path), "engine.kind=vllm", families)
    config = family_config(tmp_path, "qwen3_moe", mlp_only_layers=[1])
    sglang = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": "sglang"})})
    message = message_of(sglang, Topology(1))
    assert_names(message, "engine.kind=sglang", str(tmp_path), "mlp_only_layers", "config.json", "engine.kind=vllm")
    config = family_config(tmp_path, "mixtral", head_dim=32)
    sglang = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": "sglang"})})
    assert_names(message_of(sglang, Topology(1)), "4 heads", "head_dim=32", "16", "engine.kind=vllm")


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen3_moe", {}),
        ("mixtral", {}),
        ("glm4_moe", {}),
        ("deepseek_v2", {}),
        ("deepseek_v3", {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
        ("gpt_oss", GPT_OSS),
    ],
)
def test_families_with_experts_pass(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    config = family_config(tmp_path, family, **fields)
    longest = config.data.max_prompt_tokens + config.sampling.max_tokens
    check_model(family_config(tmp_path, family, max_position_embeddings=2 * longest, **fields), Topology(1))


def test_the_config_must_name_a_router_that_the_engine_would_replace_by_another(tmp_path: Path) -> None:
    message = message_of(family_config(tmp_path, "deepseek_v3", scoring_func="sigmoid"), Topology(1))
    assert_names(message, f"model.path={tmp_path}", "topk_method=noaux_tc", "deepseek_v3", "add it to config.json")


def test_expert_parallelism_of_a_model_without_experts_is_rejected(tmp_path: Path) -> None:
    family_config(tmp_path, "llama")
    overrides = ("model.base=null", f"model.path={tmp_path}", "engine.tp=2", "engine.ep=2", "run.world_size=2")
    message = message_of(load_config(QUICKSTART, overrides), Topology(2, engine_tp=2))
    assert_names(message, "engine.ep=2", str(tmp_path), "no experts", "use engine.ep=1")
    message = message_of(load_config(QUICKSTART, ["engine.dp=2", "run.world_size=2"]), Topology(2, engine_dp=2))
    assert_names(message, "engine.dp=2", "experts", RECIPE, "leave it out", "engine.tp")


def test_rollouts_longer_than_the_scaled_positions_of_the_engine_are_rejected(tmp_path: Path) -> None:
    fields = raw_family_config("gpt_oss", **GPT_OSS)
    rope = fields["rope_parameters"] | {"factor": 1.4375}  # 16 x 1.4375 = 23, and the quickstart takes 16 + 8
    config = family_config(tmp_path, "gpt_oss", **GPT_OSS, rope_parameters=rope)
    assert_names(message_of(config, Topology(1)), "24", "original_max_position_embeddings", "16 x 1.4375")
    check_model(family_config(tmp_path, "gpt_oss", **GPT_OSS, rope_parameters=rope | {"factor": 1.5}), Topology(1))


def test_more_ranks_than_experts_are_rejected(tmp_path: Path) -> None:
    family_config(tmp_path, "mixtral", vocab_size=160)
    overrides = ("model.base=null", f"model.path={tmp_path}", "engine.dp=8", "engine.ep=8", "run.world_size=8")
    message = message_of(load_config(QUICKSTART, overrides), Topology(8, engine_dp=8))
    assert_names(message, "engine.ep=8", str(tmp_path), "4 experts", "fewer ranks", "engine.ep=1")


def test_fp8_weights_are_rejected_if_the_engine_would_quantize_again(tmp_path: Path) -> None:
    config = family_config(
        tmp_path, "llama", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}
    )
    message = message_of(config, Topology(1))
    assert_names(message, f"model.path={tmp_path}", "quantization_config", "unquantized", "engine.fp8=scales_fp32")
    check_model(config, Topology(1), with_engine=False)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss"])
def test_every_family_passes_without_an_engine(tmp_path: Path, family: str) -> None:
    config = family_config(tmp_path, family)
    check_model(config, Topology(1), with_engine=False)
    with pytest.raises(UserError, match=r"parallel\.tp=3.*4 attention heads"):
        check_model(config, Topology(3, tp=3), with_engine=False)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_dense_families_pass(tmp_path: Path, family: str) -> None:
    check_model(family_config(tmp_path, family), Topology(2, tp=2))


SP = ParallelConfig(tp=2, sequence_parallel=True)


@pytest.mark.parametrize(
    ("family", "changes", "parallel", "topology", "named"),
    [
        ("qwen3_moe", {}, ParallelConfig(ep=3), Topology(3, ep=3), ("parallel.ep=3", "8 experts")),
        (
            "qwen3_moe",
            {"moe_intermediate_size": 33},
            ParallelConfig(etp=2),
            Topology(2, etp=2),
            ("parallel.etp=2", "33 feed-forward size of each expert"),
        ),
        (
            "deepseek_v3",
            {"n_shared_experts": 1, "moe_intermediate_size": 33},
            SP,
            Topology(2, tp=2),
            ("parallel.tp=2", "33 feed-forward size of the shared expert"),
        ),
        ("deepseek_v3", {"q_lora_rank": 21}, SP, Topology(2, tp=2), ("parallel.tp=2", "21 q_lora_rank")),
        (
            "deepseek_v2",
            {"kv_lora_rank": 25},
            SP,
            Topology(2, tp=2),
            ("parallel.tp=2", "33 kv_lora_rank + qk_rope_head_dim"),
        ),
        (
            "mixtral",
            {},
            ParallelConfig(tp=2),
            Topology(2, tp=2),
            ("parallel.tp=2", "experts", "parallel.sequence_parallel=true"),
        ),
        (
            "gpt_oss",
            {},
            ParallelConfig(etp=2),
            Topology(2, etp=2),
            ("parallel.etp=2", "biases", "parallel.etp=1"),
        ),
        ("llama", {}, ParallelConfig(ep=2), Topology(2, ep=2), ("parallel.ep=2", "no experts")),
    ],
)
def test_experts_and_latent_attention_must_be_divided_by_the_layout(
    family: str, changes: dict[str, Any], parallel: ParallelConfig, topology: Topology, named: tuple[str, ...]
) -> None:
    spec = spec_from_config(raw_family_config(family, **changes), "config.json")
    with pytest.raises(UserError) as caught:
        check_layout(spec, parallel, topology, "M")
    assert_names(caught.value, *named)


def test_layouts_that_divide_experts_and_latent_attention_pass() -> None:
    spec = spec_from_config(raw_family_config("deepseek_v3", q_lora_rank=None), "config.json")
    check_layout(spec, SP.model_copy(update={"ep": 2, "etp": 2}), Topology(4, tp=2, ep=2, etp=2), "M")
    # every layer of this model has experts, and no tensor has its dense size
    sparse = spec_from_config(raw_family_config("qwen3_moe", mlp_only_layers=[], intermediate_size=9), "config.json")
    check_layout(sparse, SP, Topology(2, tp=2), "M")


@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="this machine has devices")
def test_an_optimizer_on_the_host_needs_cuda_devices() -> None:
    message = message_of(config_of("optimizer.host_fraction=0.5"), Topology(1))
    assert_names(message, "optimizer.host_fraction=0.5", "CUDA", "leave it out")


@pytest.mark.parametrize("token", [-1, 100_000])
def test_a_logit_bias_needs_a_token_of_the_model(token: int) -> None:
    message = message_of(config_of(f"evaluation.logit_bias={{0: 1, {token}: -100}}"), Topology(1))
    assert_names(message, "evaluation.logit_bias=", str(token), RECIPE, "use ids from 0 to")


@pytest.mark.parametrize("on_cuda", [False, True])
def test_moments_in_bf16_need_cuda_devices_and_transformer_engine(
    monkeypatch: pytest.MonkeyPatch, on_cuda: bool
) -> None:
    monkeypatch.setattr(model_rules, "has_cuda_driver", lambda: on_cuda)
    monkeypatch.setattr(model_rules, "transformer_engine_release", lambda: None)
    message = message_of(config_of("optimizer.moments=bf16", "precision.dtype=bf16"), Topology(1))
    needed = ["Transformer Engine", "pip install", "=="] if on_cuda else ["CUDA"]
    assert_names(message, "optimizer.moments=bf16", *needed, "optimizer.moments=fp32")


@pytest.mark.parametrize("modules", ["auto", "local"])
def test_attention_sinks_that_transformer_engine_cannot_train_are_rejected_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw_family_config("gpt_oss")))
    model = ("model.base=null", f"model.path={tmp_path}")
    config = config_of(*model, f"policy.modules={modules}", "run.deterministic=true")
    choice = ModuleChoice(transformer_engine=modules == "auto", device="cuda")
    monkeypatch.setattr(model_rules, "choose_modules", lambda _: choice)
    if modules == "local":
        check_model(config, Topology(1), with_engine=False)
        return
    with pytest.raises(UserError) as caught:
        check_model(config, Topology(1), with_engine=False)
    assert_names(caught.value.message, "policy.modules=auto", "attention sinks", "run.deterministic=true")
    assert caught.value.remedy == "set policy.modules=local"


def test_a_server_on_another_machine_needs_a_secret_and_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPO_MEGA_SERVER_TOKEN", raising=False)
    monkeypatch.delenv("GRPO_MEGA_SERVER_TOKEN_FILE", raising=False)
    config = config_of("engine.placement=server", "engine.urls=['localhost:7', 'node3:7']")
    topology = Topology(2, engine_servers=2)
    message = message_of(config, topology)
    assert_names(message, "engine.urls[1]=node3:7", "secret", "GRPO_MEGA_SERVER_TOKEN", "GRPO_MEGA_SERVER_TOKEN_FILE")
    monkeypatch.setenv("GRPO_MEGA_SERVER_TOKEN", "0123456789abcdef")
    check_model(config, topology)
    monkeypatch.delenv("GRPO_MEGA_SERVER_TOKEN")
    keys = "engine.placement=server", "engine.urls=['localhost:7']", "engine.spare_urls=['node4:7']"
    assert_names(message_of(config_of(*keys), Topology(1, engine_servers=1)), "engine.spare_urls[0]=node4:7", "secret")
    message = message_of(config_of("engine.placement=server", "engine.urls=[node3]"), topology)
    assert_names(message, "engine.urls[0]=node3", "host:port")


@pytest.mark.parametrize(
    ("files", "overrides", "is_rejected"),
    [
        (1, ("engine.tp=2",), True),  # Slurm's --gpus-per-task=1
        (2, ("engine.tp=2",), False),
        (1, ("engine.tp=1",), False),
        (0, ("engine.tp=2",), False),  # the files of the devices have other names
        (1, ("engine.tp=2", "engine.kind=vllm"), False),  # an engine in the process of each rank
    ],
)
def test_sglang_on_several_ranks_needs_a_task_that_can_use_their_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, overrides: tuple[str, ...], is_rejected: bool
) -> None:
    for number in range(files):
        (tmp_path / f"nvidia{number}").touch()
    monkeypatch.setattr(devices, "DRIVER_FOLDER", tmp_path)
    monkeypatch.setattr(devices, "DEVICE_FILES", tmp_path)
    config = config_of("engine.kind=sglang", "precision.dtype=bf16", "policy.modules=local", *overrides)
    topology = Topology.of(config, 2)
    if not is_rejected:
        check_model(config, topology)
        return
    named = ("engine.tp=2", "engine.kind=sglang", "can use 1 GPU(s)", "--gpus-per-task", "one task per node")
    assert_names(message_of(config, topology), *named)
