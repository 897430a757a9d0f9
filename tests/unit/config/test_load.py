"""From YAML and overrides to a `Config`: accepted values, messages of rejected ones, and every rule between keys."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from grpo_mega.config.load import load_config, precedence_notes, resolved
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
MINIMAL: dict[str, Any] = {
    "model": {"base": {"task": "arithmetic"}},
    "data": {"train": "arithmetic:train"},
    "reward": {"terms": [{"name": "exact"}]},
    "train": {"steps": 3},
}


def write_config(folder: Path, config: object = None) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(MINIMAL if config is None else config))
    return path


@pytest.fixture
def minimal_config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_config_of_the_repository_loads_and_survives_its_resolved_form(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.run.dir == f"runs/{path.stem}"
    again = tmp_path / "other-name.yaml"
    again.write_text(yaml.safe_dump(resolved(config)))
    assert load_config(again) == config


def test_resolved_form_holds_every_default(minimal_config: Path) -> None:
    values = resolved(load_config(minimal_config))
    assert values["sampling"] == {
        "group_size": 8, "temperature": 1.0, "max_tokens": 256, "prompts_per_wave": None, "partial": None,
    }  # fmt: skip
    assert values["reward"]["terms"] == [{"name": "exact", "weight": 1.0, "args": {}, "datasets": None}]
    assert values["model"]["base"]["architecture"]["head_dim"] == 32


def test_overrides_are_yaml_values_of_their_key(minimal_config: Path) -> None:
    config = load_config(
        minimal_config,
        [
            "train.steps=20",
            "optimizer.lr=1e-4",
            "optimizer.eps=+1E-06",
            "optimizer.weight_decay=1",
            "run.overwrite=true",
            "run.dir=runs/a=b",
            "data.eval=null",
            "data.system_prompt='1e-4'",
            "data.train='/a: b'",
            "model.base.architecture.num_layers=2",
            "model.base.seed=1_000",
            "reward.terms=[{name: exact, weight: 2e0}, {name: format, args: {kind: gsm8k}}]",
        ],
    )
    assert config.train.steps == 20
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.weight_decay) == (1e-4, 1e-6, 1.0)
    assert config.run.overwrite is True
    assert config.run.dir == "runs/a=b"
    assert (config.data.eval, config.data.system_prompt, config.data.train) == (None, "1e-4", "/a: b")
    assert config.model.base is not None
    assert (config.model.base.architecture.num_layers, config.model.base.architecture.head_dim) == (2, 32)
    assert config.model.base.seed == 1000
    assert [(term.name, term.weight, term.args) for term in config.reward.terms] == [
        ("exact", 2.0, {}),
        ("format", 1.0, {"kind": "gsm8k"}),
    ]


def test_exponents_in_the_file_are_numbers_too(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "optimizer: {lr: 3e-5, weight_decay: 0.1, eps: 1.e-9}\n")
    optimizer = load_config(path).optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.eps) == (3e-5, 0.1, 1e-9)


def test_a_byte_order_mark_at_the_start_of_the_file_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8-sig")
    marked = load_config(path)
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    assert marked == load_config(path)


def test_a_key_that_occurs_twice_in_a_file_is_rejected_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "optimizer:\n  lr: 3e-5\n  lr: 1e-5\n")
    line = len(path.read_text().splitlines())
    assert_names(message_of(path), str(path), f"line {line}", "lr occurs twice")
    path.write_text(yaml.safe_dump(MINIMAL) + "train: {steps: 3}\n")
    assert_names(message_of(path), str(path), "train occurs twice")


@pytest.mark.parametrize("key", ["engine.args", "parallel.megatron"])
def test_an_alias_inside_its_own_value_is_rejected_with_its_key(minimal_config: Path, key: str) -> None:
    message = message_of(minimal_config, f"{key}={{a: &x {{b: *x}}}}")
    assert message.startswith(f"{key}.a.b: this YAML alias")
    assert "without an alias" in message


@pytest.mark.parametrize("written", ["off", "'off'", "false", "Off"])
def test_the_verification_of_a_weight_sync_can_be_switched_off_with_and_without_quotes(
    minimal_config: Path, written: str, tmp_path: Path
) -> None:
    config = load_config(minimal_config, [f"weight_sync.verify={written}"])
    assert config.weight_sync.verify == "off"
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(resolved(config)))
    assert load_config(again).weight_sync.verify == "off"


@pytest.mark.parametrize("written", ["on", "0", "never"])
def test_other_values_of_the_verification_are_rejected_with_the_choices(minimal_config: Path, written: str) -> None:
    message = message_of(minimal_config, f"weight_sync.verify={written}")
    assert message.startswith("weight_sync.verify=")
    assert "'every', 'first' or 'off'" in message


def test_the_last_of_two_overrides_of_a_key_holds(minimal_config: Path) -> None:
    assert load_config(minimal_config, ["train.steps=5", "train.steps=7"]).train.steps == 7


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.step=3", ["train.step", "train.steps"]),
        ("sampling.tempera=1", ["sampling.tempera", "sampling.temperature"]),
        ("model.base.architecture.layers=2", ["model.base.architecture.layers", "model.base.architecture.num_layers"]),
        ("optimizer.zzzzzzzzz=1", ["optimizer.zzzzzzzzz", "config.md"]),
        ("zzzzzzzzzzzz.q=1", ["zzzzzzzzzzzz", "config.md"]),
        ("train.steps=many", ["train.steps='many'", "integer"]),
        ("train.steps=1e3", ["train.steps=1000.0", "integer"]),
        ("train.steps='3'", ["train.steps='3'", "integer"]),
        ("run.overwrite=1", ["run.overwrite=1", "boolean"]),
        ("data.train=7", ["data.train=7", "string"]),
        ("observe.rollouts=some", ["observe.rollouts='some'", "'all' or 'none'", "use one of these"]),
        ("observe.rollouts={sample: 0}", ["observe.rollouts.sample=0", "1"]),
        (
            "observe.rollouts.samples=3",
            ["observe.rollouts.sample: this key is required", "samples: unknown key"],
        ),
        ("train.steps=0", ["train.steps=0", "1"]),
        ("algorithm.clip_low=1.0", ["algorithm.clip_low=1.0", "1"]),
        ("optimizer.lr=.inf", ["optimizer.lr=inf", "finite number"]),
        ("guard.timeout_seconds=.nan", ["guard.timeout_seconds=nan", "finite number"]),
        ("precision.dtype=fp16", ["precision.dtype='fp16'", "'fp32'", "'bf16'"]),
        ("train.steps.more=3", ["train.steps={'more'", "3"]),
        ("train=3", ["override 'train=3'", "section.key=value", "train.steps=20"]),
        ("train.steps", ["override 'train.steps'", "section.key=value", "train.steps=20"]),
        ("data.train=[a", ["data.train=[a", "quotes"]),
    ],
)
def test_a_wrong_override_is_rejected_with_key_value_and_rule(
    minimal_config: Path, override: str, parts: list[str]
) -> None:
    message = message_of(minimal_config, override)
    assert message.startswith(parts[0])
    for part in parts:
        assert part in message


@pytest.mark.parametrize("missing", ["model", "data", "reward", "train"])
def test_a_missing_section_is_named(tmp_path: Path, missing: str) -> None:
    config = {name: section for name, section in MINIMAL.items() if name != missing}
    assert_names(message_of(write_config(tmp_path, config)), missing, "required", "set it")


def test_missing_keys_are_named_each_on_a_line(tmp_path: Path) -> None:
    lines = message_of(write_config(tmp_path, MINIMAL | {"train": {}, "data": {}})).splitlines()
    for line, key in zip(lines, ("data.train", "train.steps"), strict=True):
        assert_names(line, key, "required", "set it")


def test_a_file_that_is_not_a_config_is_named_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text("model: [a\ntrain: {")
    assert message_of(path).startswith(f"{path} is not valid YAML")
    assert "\n" not in message_of(path)
    path.write_bytes(b"\xff\xfe\x00")
    assert message_of(path).startswith(f"{path} is not valid YAML")
    for text in ("a: 2024-13-45", "a: !!int b", "a: !!bool b", "[" * 500):
        path.write_text(text)
        assert message_of(path).startswith(f"{path} is not valid YAML")
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(4300)  # Python's default, which some libraries lift
    try:
        path.write_text("a: " + "9" * 5000)
        assert message_of(path).startswith(f"{path} is not valid YAML")
    finally:
        sys.set_int_max_str_digits(limit)
    path.write_text("- a\n- b\n")
    assert message_of(path).startswith(f"{path} must hold sections")
    assert "list" in message_of(path)
    path.write_text("")
    assert message_of(path).startswith(f"{path} must hold sections")
    assert "NoneType" in message_of(path)


def test_a_missing_file_is_answered_with_the_nearest_one(minimal_config: Path) -> None:
    wanted = minimal_config.with_name("tiyn.yaml")
    assert_names(message_of(wanted), f"CONFIG={wanted}", "did you mean tiny.yaml")
    wanted = minimal_config.parent / "nowhere" / "x.yaml"
    assert_names(message_of(wanted), f"CONFIG={wanted}", "see configs/")
    wanted = minimal_config.with_name("folder.yaml")
    wanted.mkdir()
    assert_names(message_of(wanted), f"CONFIG={wanted}", "see configs/")
    assert_names(message_of(Path("x" * 300)), "cannot be read", "name a readable file")


def test_config_is_frozen(minimal_config: Path) -> None:
    config = load_config(minimal_config)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 4


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.path=a"], ["model", "model.path", "model.base"]),
        (["model.base=null"], ["model", "model.path", "model.base"]),
        (["sampling.group_size=1"], ["sampling.group_size=1", "algorithm.advantage=group_std", "2"]),
        (
            ["algorithm.name=gspo", "algorithm.gate_positive=1.5"],
            [
                "algorithm.gate_positive=1.5",
                "algorithm.surrogate=clipped_sequence_ratio",
                "algorithm.name=gspo",
                "algorithm.gate_positive=null",
            ],
        ),
        (["run.world_size=6", "parallel.tp=2", "parallel.pp=2"], ["run.world_size=6", "4"]),
        (["run.world_size=4", "parallel.ep=4", "parallel.etp=2"], ["run.world_size=4", "8"]),
        (
            ["parallel.num_layers_last_stage=3"],
            ["parallel.num_layers_last_stage=3", "parallel.pp=1", "parallel.pp", "parallel.num_layers_last_stage"],
        ),
        (
            ["parallel.pipeline_layout=EtL"],
            ["parallel.pipeline_layout=EtL", "parallel.pp=1", "parallel.pp", "parallel.pipeline_layout"],
        ),
        (["parallel.vpp=2"], ["parallel.vpp=2", "parallel.pp=1", "parallel.pp", "parallel.vpp"]),
        (
            ["parallel.pp=2", "parallel.pipeline_layout='Et|tL'", "parallel.num_layers_first_stage=1"],
            ["parallel.pipeline_layout=Et|tL", "remove the other two keys"],
        ),
        (
            ["parallel.recompute=full", "parallel.recompute_modules=[mlp]"],
            ["parallel.recompute_modules", "parallel.recompute=full", "parallel.recompute=selective"],
        ),
        (
            ["parallel.recompute=selective", "parallel.recompute_modules=[]"],
            ["parallel.recompute_modules=[]", "parallel.recompute=none"],
        ),
        (
            ["parallel.overlap_param_gather=true"],
            [
                "parallel.overlap_param_gather=true",
                "parallel.overlap_grad_reduce=true",
                "set both to true, or both to false",
            ],
        ),
        (
            ["algorithm.name=rloo", "algorithm.kl_in=loss", "algorithm.old_log_probs=sampler"],
            ["algorithm.old_log_probs=sampler", "algorithm.surrogate=policy_gradient", "surrogate=clipped_weight"],
        ),
        (
            ["algorithm.old_log_probs=sampler", "algorithm.kl_in=reward"],
            ["algorithm.old_log_probs=sampler", "algorithm.kl_in=reward", "use kl_in=loss"],
        ),
        (
            ["algorithm.old_log_probs=sampler", "algorithm.correction=token_truncated"],
            ["algorithm.old_log_probs=sampler", "algorithm.correction=token_truncated", "again", "token_masked"],
        ),
        (
            ["algorithm.old_log_probs=sampler", "algorithm.correction=null"],
            ["algorithm.old_log_probs=sampler", "algorithm.correction=null", "token_masked"],
        ),
        (["run.world_size=3", "engine.tp=2"], ["run.world_size=3", "engine.tp=2", "2"]),
        (
            ["engine.urls=['a:1']"],
            ["engine.urls=['a:1']", "engine.placement=colocated", "engine.placement=server", "engine.urls"],
        ),
        (
            ["engine.spare_urls=['a:1']"],
            ["engine.spare_urls=['a:1']", "engine.placement=colocated", "remove engine.spare_"],
        ),
        (
            ["engine.placement=server", "engine.urls=['a:1']", "engine.spare_urls=['b:1', 'a:1']"],
            ["engine.urls=['a:1']", "engine.spare_urls=['b:1', 'a:1']", "remove the repeated address"],
        ),
        (["engine.placement=server"], ["engine.urls=[]", "engine.placement=server", "serve.sh", "engine.urls=[host"]),
        (
            ["engine.placement=server", "engine.urls=['a:1', 'a:1']"],
            ["engine.urls=['a:1', 'a:1']", "remove the repeated address"],
        ),
        (
            ["engine.placement=server", "engine.urls=['a:1', 'a:2']", "run.world_size=3"],
            ["engine.urls", "run.world_size=3", "3"],
        ),
        (
            ["engine.placement=server", "engine.urls=['a:1']", "engine.kind=sglang"],
            ["engine.placement=server", "engine.kind=sglang", "engine.kind=vllm", "engine.placement=colocated"],
        ),
        (["run.world_size=6", "engine.tp=2", "engine.dp=2"], ["run.world_size=6", "4"]),
        (["engine.tp=2", "engine.dp=2", "engine.ep=2"], ["engine.ep=2", "1", "4"]),
        (["engine.kind=sglang", "engine.dp=2"], ["engine.dp=2", "engine.kind=sglang", "engine.dp=1", "engine.tp"]),
        (
            ["engine.placement=server", "engine.urls=[a:1]", "engine.dp=2"],
            ["engine.dp=2", "engine.placement=server", "engine.dp=1"],
        ),
        (
            ["parallel.sequence_parallel=true"],
            ["parallel.sequence_parallel=true", "parallel.tp=1", "parallel.tp", "parallel.sequence_parallel"],
        ),
        (["train.max_tokens_per_microbatch=1279"], ["train.max_tokens_per_microbatch=1279", "1280"]),
        (
            ["train.max_tokens_per_microbatch=1280", "parallel.cp=3"],
            ["train.max_tokens_per_microbatch=1280", "parallel.cp=3", "1284"],
        ),
        (["train.minibatches_per_epoch=33"], ["train.minibatches_per_epoch=33", "data.prompts_per_step=32", "32"]),
        (["evaluation.every=2"], ["evaluation.every=2", "data.eval"]),
        (["evaluation.report_k=[2, 8]"], ["evaluation.report_k=[2, 8]", "evaluation.k=4", "8", "evaluation.k"]),
        (["data.train=[{path: a, wegiht: 2}]"], ["data.train.0.wegiht", "data.train.weight"]),
        (
            ["checkpoint.local_every=2"],
            ["checkpoint.local_every=2 needs a folder on every machine", "set checkpoint.local_dir"],
        ),
        (
            ["checkpoint.local_dir=/x"],
            ["checkpoint.local_dir=/x does nothing without checkpoint.local_every", "remove it"],
        ),
        (
            ["checkpoint.local_every=2", "checkpoint.local_dir=x"],
            ["checkpoint.local_dir=x is not an absolute path", "that all machines have"],
        ),
        (["reward.terms=[]"], ["reward.terms=[]", "add a reward, for example {name: exact}"]),
    ],
)
def test_each_rule_between_keys_names_key_value_and_remedy(
    minimal_config: Path, overrides: list[str], parts: list[str]
) -> None:
    message = message_of(minimal_config, *overrides)
    assert message.startswith(parts[0])
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.base=null", "model.path=a"],
        ["sampling.group_size=2"],
        ["run.world_size=8", "parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true", "engine.tp=4"],
        ["run.world_size=8", "parallel.tp=2", "parallel.ep=4", "parallel.etp=2"],
        ["run.world_size=2", "engine.placement=server", "engine.urls=['a:1', 'a:2']", "engine.tp=4"],
        ["parallel.pp=2", "parallel.num_layers_first_stage=1"],
        ["parallel.pp=2", "parallel.pipeline_layout='Et|tL'"],
        ["parallel.recompute=selective", "parallel.recompute_modules=[mlp, core_attn]"],
        ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"],
        ["algorithm.old_log_probs=sampler"],
        ["algorithm.old_log_probs=sampler", "algorithm.name=gspo"],
        ["algorithm.old_log_probs=sampler", "algorithm.name=ppo", "algorithm.kl_in=loss"],
        [
            "algorithm.old_log_probs=sampler",
            "algorithm.name=rloo",
            "algorithm.kl_coef=0",
            "algorithm.surrogate=clipped_weight",
            "algorithm.clip_high=4.0",
        ],
        ["train.max_tokens_per_microbatch=1280"],
        ["train.max_tokens_per_microbatch=1284", "parallel.cp=3"],
        ["train.minibatches_per_epoch=32"],
        ["evaluation.every=2", "data.eval=arithmetic:heldout"],
        ["checkpoint.local_every=2", "checkpoint.local_dir=/x"],
    ],
)
def test_the_remedies_of_the_rules_are_accepted(minimal_config: Path, overrides: list[str]) -> None:
    load_config(minimal_config, overrides)


def test_a_value_of_the_file_stays_under_another_algorithm_and_a_note_says_so(tmp_path: Path) -> None:
    path = write_config(tmp_path, MINIMAL | {"algorithm": {"kl_coef": 0.04, "clip_high": 0.28, "clip_low": 0.1}})
    assert load_config(path, ["algorithm.name=dapo"]).algorithm.kl_coef == 0.04
    (note,) = precedence_notes(path, ["algorithm.name=dapo"])
    assert_names(note, "algorithm.kl_coef=0.04", str(path), "algorithm.name=dapo", "add algorithm.kl_coef=0.0")
    assert precedence_notes(path, ["algorithm.name=dapo", "algorithm.kl_coef=0.0"]) == []
    assert precedence_notes(path, ["algorithm.name=grpo"]) == precedence_notes(path, []) == []


def test_evaluation_is_turned_off_by_one_key(tmp_path: Path) -> None:
    path = write_config(tmp_path, MINIMAL | {"evaluation": {"every": 5}})
    assert "evaluation.every=5" in message_of(path)
    path = write_config(tmp_path, MINIMAL | {"evaluation": {"every": 5}, "data": MINIMAL["data"] | {"eval": "a.jsonl"}})
    assert load_config(path, ["data.eval=null"]).data.eval_sets == ()


@pytest.mark.parametrize("key", ["engine.urls", "evaluation.report_k", "reward.terms"])
def test_a_list_is_called_a_list(minimal_config: Path, key: str) -> None:
    assert message_of(minimal_config, f"{key}=5") == f"{key}=5: input should be a list"


def test_verification_is_turned_off_from_the_file_and_the_command_line(tmp_path: Path) -> None:
    assert load_config(write_config(tmp_path), ["weight_sync.verify=off"]).weight_sync.verify == "off"
    path = tmp_path / "off.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "weight_sync: {verify: off}\n")
    assert load_config(path).weight_sync.verify == "off"


def test_an_override_without_a_section_names_the_whole_key(minimal_config: Path) -> None:
    assert "did you mean optimizer.lr=1e-5?" in message_of(minimal_config, "lr=1e-5")
