"""From YAML and overrides to a `Config`: what is accepted, what each refusal says, and every rule between keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from grpo_mega.config.load import load_config, resolved
from grpo_mega.types import UserError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
MINIMAL: dict[str, Any] = {
    "model": {"base": {"task": "arithmetic"}},
    "data": {"train": "arithmetic:train"},
    "reward": {"terms": [{"name": "exact"}]},
    "train": {"steps": 3},
}


def write(folder: Path, config: object = None) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(MINIMAL if config is None else config))
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path)


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


def test_resolved_form_holds_every_default(minimal: Path) -> None:
    values = resolved(load_config(minimal))
    assert values["sampling"] == {"group_size": 8, "temperature": 1.0, "max_tokens": 256, "prompts_per_wave": None}
    assert values["reward"]["terms"] == [{"name": "exact", "weight": 1.0, "args": {}}]
    assert values["model"]["base"]["architecture"]["head_dim"] == 32


def test_overrides_are_yaml_values_of_their_key(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "train.steps=20",
            "optimizer.lr=1e-4",
            "optimizer.eps=+1E-06",
            "optimizer.weight_decay=1",
            "run.overwrite=true",
            "run.dir=runs/a=b",
            "data.eval=null",
            "data.system_prompt='1e-4'",
            "data.train='a: b'",
            "model.base.architecture.num_layers=2",
            "model.base.seed=1_000",
            "reward.terms=[{name: exact, weight: 2e0}, {name: format, args: {kind: gsm8k}}]",
        ],
    )
    assert config.train.steps == 20
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.weight_decay) == (1e-4, 1e-6, 1.0)
    assert config.run.overwrite is True
    assert config.run.dir == "runs/a=b"
    assert (config.data.eval, config.data.system_prompt, config.data.train) == (None, "1e-4", "a: b")
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


def test_a_key_that_a_file_gives_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "optimizer:\n  lr: 3e-5\n  lr: 1e-5\n")
    line = len(path.read_text().splitlines())
    assert message_of(path) == f"{path}: not valid YAML: line {line}: the key lr is given twice"
    path.write_text(yaml.safe_dump(MINIMAL) + "train: {steps: 3}\n")
    assert "the key train is given twice" in message_of(path)


def test_the_last_of_two_overrides_of_a_key_holds(minimal: Path) -> None:
    assert load_config(minimal, ["train.steps=5", "train.steps=7"]).train.steps == 7


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.step=3", "train.step: unknown key; did you mean train.steps?"),
        ("sampling.tempera=1", "sampling.tempera: unknown key; did you mean sampling.temperature?"),
        (
            "model.base.architecture.layers=2",
            "model.base.architecture.layers: unknown key; did you mean model.base.architecture.num_layers?",
        ),
        ("zzzzzzzzzzzz.q=1", "zzzzzzzzzzzz: unknown key; see grpo_mega/config/schema.py for the keys"),
        ("train.steps=many", "train.steps='many': input should be a valid integer"),
        ("train.steps=1e3", "train.steps=1000.0: input should be a valid integer"),
        ("train.steps='3'", "train.steps='3': input should be a valid integer"),
        ("run.overwrite=1", "run.overwrite=1: input should be a valid boolean"),
        ("data.train=7", "data.train=7: input should be a valid string"),
        ("train.steps=0", "train.steps=0: input should be greater than or equal to 1"),
        ("algorithm.clip_low=1.0", "algorithm.clip_low=1.0: input should be less than 1"),
        ("optimizer.lr=.inf", "optimizer.lr=inf: input should be a finite number"),
        ("guard.timeout_seconds=.nan", "guard.timeout_seconds=nan: input should be a finite number"),
        ("precision.dtype=fp16", "precision.dtype='fp16': input should be 'fp32' or 'bf16'"),
        ("train.steps.more=3", "train.steps={'more': 3}: input should be a valid integer"),
        ("train=3", "override 'train=3': expected section.key=value, for example train.steps=20"),
        ("train.steps", "override 'train.steps': expected section.key=value, for example train.steps=20"),
        ("data.train=[a", "data.train=[a: not a YAML value; quote text that holds : or ["),
    ],
)
def test_a_wrong_override_is_refused_with_key_got_and_rule(minimal: Path, override: str, said: str) -> None:
    assert message_of(minimal, override) == said


@pytest.mark.parametrize("missing", ["model", "data", "reward", "train"])
def test_a_missing_section_is_named(tmp_path: Path, missing: str) -> None:
    config = {name: section for name, section in MINIMAL.items() if name != missing}
    assert message_of(write(tmp_path, config)) == f"{missing}: missing; every config sets it"


def test_missing_keys_are_named_each_on_a_line(tmp_path: Path) -> None:
    said = message_of(write(tmp_path, MINIMAL | {"train": {}, "data": {}}))
    assert said.splitlines() == [f"{key}: missing; every config sets it" for key in ("data.train", "train.steps")]


def test_a_file_that_is_not_a_config_is_named_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text("model: [a\ntrain: {")
    assert message_of(path).startswith(f"{path}: not valid YAML: while parsing a flow")
    assert "\n" not in message_of(path)
    path.write_bytes(b"\xff\xfe\x00")
    assert message_of(path).startswith(f"{path}: not valid YAML")
    path.write_text("- a\n- b\n")
    assert message_of(path) == f"{path}: holds list, expected sections such as `model:` and `train:`"
    path.write_text("")
    assert message_of(path) == f"{path}: holds NoneType, expected sections such as `model:` and `train:`"


def test_a_missing_file_is_answered_with_the_nearest_one(minimal: Path) -> None:
    wanted = minimal.with_name("tiyn.yaml")
    assert message_of(wanted) == f"CONFIG={wanted}: no such file; did you mean tiny.yaml?"
    wanted = minimal.parent / "nowhere" / "x.yaml"
    assert message_of(wanted) == f"CONFIG={wanted}: no such file; see configs/"


def test_config_is_frozen(minimal: Path) -> None:
    config = load_config(minimal)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 4


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["model.path=a"],
            "model: set exactly one of model.path (a Hugging Face folder) and model.base (a tiny recipe)",
        ),
        (
            ["model.base=null"],
            "model: set exactly one of model.path (a Hugging Face folder) and model.base (a tiny recipe)",
        ),
        (
            ["sampling.group_size=1"],
            "sampling.group_size=1: an advantage is relative to its group; use 2 or more",
        ),
        (
            ["algorithm.name=gspo", "algorithm.gate_positive=1.5"],
            "algorithm.gate_positive=1.5 does nothing with algorithm.surrogate=clipped_sequence_ratio "
            "(algorithm.name=gspo); set it to null",
        ),
        (
            ["run.world_size=6", "parallel.tp=2", "parallel.pp=2"],
            "run.world_size=6 is not a multiple of parallel.tp x parallel.cp x parallel.pp = 2 x 1 x 2; use a multiple "
            "of 4",
        ),
        (
            ["run.world_size=4", "parallel.ep=4", "parallel.etp=2"],
            "run.world_size=4 is not a multiple of parallel.etp x parallel.ep x parallel.pp = 2 x 4 x 1; use a "
            "multiple of 8",
        ),
        (
            ["parallel.num_layers_last_stage=3"],
            "parallel.num_layers_last_stage=3 does nothing with parallel.pp=1; raise pp or leave it out",
        ),
        (
            ["parallel.pipeline_layout=EtL"],
            "parallel.pipeline_layout=EtL does nothing with parallel.pp=1; raise pp or leave it out",
        ),
        (
            ["parallel.vpp=2"],
            "parallel.vpp=2 needs a pipeline; raise parallel.pp=1 or leave vpp out",
        ),
        (
            ["parallel.pp=2", "parallel.pipeline_layout='Et|tL'", "parallel.num_layers_first_stage=1"],
            "parallel.pipeline_layout=Et|tL says already how many layers each stage has; leave "
            "parallel.num_layers_first_stage and parallel.num_layers_last_stage out",
        ),
        (
            ["parallel.recompute=full", "parallel.recompute_modules=[mlp]"],
            "parallel.recompute_modules does nothing with parallel.recompute=full; use selective, or leave the modules "
            "out",
        ),
        (
            ["parallel.recompute=selective", "parallel.recompute_modules=[]"],
            "parallel.recompute_modules=[] recomputes nothing; name a module, or use recompute=none",
        ),
        (
            ["parallel.overlap_param_gather=true"],
            "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true (Megatron gathers at the "
            "buckets that it reduced); set both or none",
        ),
        (
            ["run.world_size=3", "engine.tp=2"],
            "run.world_size=3 is not a multiple of engine.tp=2; use one that is",
        ),
        (
            ["engine.urls=['a:1']"],
            "engine.urls=['a:1'] does nothing with engine.placement=colocated; set engine.placement=server, or leave "
            "it out",
        ),
        (
            ["engine.placement=server"],
            "engine.placement=server without engine.urls; start launch/serve.sh with this config on other devices, and "
            "list the addresses that it prints: engine.urls=[host:port, ...]",
        ),
        (
            ["engine.placement=server", "engine.urls=['a:1', 'a:1']"],
            "engine.urls=['a:1', 'a:1'] names a server twice; a server is one replica",
        ),
        (
            ["engine.placement=server", "engine.urls=['a:1', 'a:2']", "run.world_size=3"],
            "engine.urls names 2 servers, which do not divide the 3 rank(s) of this job: each serves an equal part of "
            "them; use a number of servers that divides 3",
        ),
        (
            ["engine.placement=server", "engine.urls=['a:1']", "engine.kind=sglang"],
            "engine.placement=server with engine.kind=sglang, which runs beside the ranks only; use engine.kind=vllm, "
            "or engine.placement=colocated",
        ),
        (
            ["run.world_size=6", "engine.tp=2", "engine.dp=2"],
            "run.world_size=6 is not a multiple of engine.tp x engine.dp = 2 x 2; use one that is",
        ),
        (
            ["engine.tp=2", "engine.dp=2", "engine.ep=2"],
            "engine.ep=2: experts are spread over all ranks of an engine or not at all; use 1 or engine.tp x engine.dp "
            "= 2 x 2",
        ),
        (
            ["engine.kind=sglang", "engine.dp=2"],
            "engine.dp=2 with engine.kind=sglang, whose copies of the attention would share no experts; use "
            "engine.dp=1: every engine.tp ranks are a replica",
        ),
        (
            ["engine.placement=server", "engine.urls=[a:1]", "engine.dp=2"],
            "engine.dp=2 with engine.placement=server: a server's ranks sample the same rollouts; use engine.dp=1, and "
            "a server for each share of the prompts",
        ),
        (
            ["parallel.sequence_parallel=true"],
            "parallel.sequence_parallel=true does nothing with parallel.tp=1; raise tp or leave it out",
        ),
        (
            ["train.max_tokens_per_microbatch=1279"],
            "train.max_tokens_per_microbatch=1279 is less than data.max_prompt_tokens + sampling.max_tokens = 1280; "
            "raise it to 1280 or more",
        ),
        (
            ["train.max_tokens_per_microbatch=1280", "parallel.cp=3"],
            "train.max_tokens_per_microbatch=1280 is less than data.max_prompt_tokens + sampling.max_tokens = 1280 (to "
            "a multiple of 6 with parallel.cp=3); raise it to 1284 or more",
        ),
        (
            ["train.minibatches_per_epoch=33"],
            "train.minibatches_per_epoch=33 is more than data.prompts_per_step=32; minibatches hold whole groups",
        ),
        (
            ["evaluation.every=2"],
            "evaluation.every=2 does nothing without data.eval; set data.eval",
        ),
        (
            ["evaluation.report_k=[2, 8]"],
            "evaluation.report_k: 8 of evaluation.k=4 samples; use numbers from 1 to 4, or raise evaluation.k",
        ),
        (
            ["data.train=[{path: a, wegiht: 2}]"],
            "data.train.0.wegiht: unknown key; did you mean data.train.weight?",
        ),
        (
            ["reward.terms=[]"],
            "reward.terms is empty; name at least one reward, for example {name: exact}",
        ),
    ],
)
def test_each_rule_between_keys_says_key_got_rule_and_remedy(minimal: Path, overrides: list[str], said: str) -> None:
    assert message_of(minimal, *overrides) == said


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
        ["train.max_tokens_per_microbatch=1280"],
        ["train.max_tokens_per_microbatch=1284", "parallel.cp=3"],
        ["train.minibatches_per_epoch=32"],
        ["evaluation.every=2", "data.eval=arithmetic:heldout"],
    ],
)
def test_the_remedies_of_the_rules_are_accepted(minimal: Path, overrides: list[str]) -> None:
    load_config(minimal, overrides)
