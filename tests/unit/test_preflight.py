"""Does the layout divide the model, and does a rollout fit it: each answer names key, number and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_mega.config.load import load_config
from grpo_mega.config.schema import Config
from grpo_mega.parallel.topology import Topology
from grpo_mega.preflight import check_model
from grpo_mega.types import UserError

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
SHAPE = "model.base.architecture."
RECIPE = "model.base.architecture"


def config_of(*overrides: str) -> Config:
    """4 heads, 2 key-value heads, ffn 384, 4 layers, 64 positions, prompts of 16 and answers of 8 tokens."""
    return load_config(QUICKSTART, overrides)


def message_of(config: Config, topology: Topology) -> str:
    with pytest.raises(UserError) as caught:
        check_model(config, topology)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "topology", "said"),
    [
        ((), Topology(3, tp=3), f"parallel.tp=3 does not divide the 4 attention heads of {RECIPE}; use one of 1, 2, 4"),
        (
            (),
            Topology(8, engine_tp=8),
            f"engine.tp=8 does not divide the 4 attention heads of {RECIPE}; use one of 1, 2, 4",
        ),
        (
            (SHAPE + "ffn_size=9",),
            Topology(2, tp=2),
            f"parallel.tp=2 does not divide the 9 feed-forward size of {RECIPE}; use one of 1, 3, 9",
        ),
        (
            (SHAPE + "ffn_size=10",),
            Topology(4, engine_tp=4),
            f"engine.tp=4 does not divide the 10 feed-forward size of {RECIPE}; use one of 1, 2, 5, 10",
        ),
        ((), Topology(4, tp=4), f"parallel.tp=4 does not divide the 2 key-value heads of {RECIPE}; use one of 1, 2"),
        (
            ("parallel.pp=3",),
            Topology(3, pp=3),
            f"parallel.pp=3 does not divide the 4 layers of {RECIPE}; use one of 1, 2, 4, or set "
            "parallel.num_layers_first_stage, parallel.num_layers_last_stage or parallel.pipeline_layout",
        ),
        (
            ("parallel.recompute=selective", "parallel.recompute_modules=[mlp, moe]"),
            Topology(1),
            f"parallel.recompute_modules: moe does nothing: {RECIPE} has no experts; leave it out",
        ),
        ((), Topology(2, ep=2), f"parallel.ep=2 does nothing: {RECIPE} has no experts; leave it out"),
        (
            ("sampling.max_tokens=49",),
            Topology(1),
            f"data.max_prompt_tokens + the largest max_tokens = 65 is more than the 64 positions of {RECIPE}; lower "
            "one of them",
        ),
        (
            ("evaluation.max_tokens=60",),
            Topology(1),
            f"data.max_prompt_tokens + the largest max_tokens = 76 is more than the 64 positions of {RECIPE}; lower "
            "one of them",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(overrides: tuple[str, ...], topology: Topology, said: str) -> None:
    assert message_of(config_of(*overrides), topology) == said


@pytest.mark.parametrize(
    ("overrides", "topology"),
    [
        ((), Topology(1)),
        (("parallel.pp=3", "parallel.num_layers_first_stage=2"), Topology(3, pp=3)),
        ((), Topology(8, tp=2, pp=4, engine_tp=4)),  # an engine's ranks may share a key-value head
        (("sampling.max_tokens=48", "evaluation.max_tokens=48"), Topology(1)),
    ],
)
def test_what_fits_is_accepted(overrides: tuple[str, ...], topology: Topology) -> None:
    check_model(config_of(*overrides), topology)


def test_sizes_of_a_checkpoint_are_read_from_its_config(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config = config_of("model.base=null", f"model.path={folder}")
    assert message_of(config, Topology(1)) == f"model.path={folder} is not a folder; give a Hugging Face model folder"
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
    assert message_of(config, Topology(2, tp=2)) == (
        f"parallel.tp=2 does not divide the 3 key-value heads of {folder}; use one of 1, 3"
    )
    said = message_of(config_of("model.base=null", f"model.path={folder}", "parallel.pp=2"), Topology(2, pp=2))
    assert said.startswith(f"parallel.pp=2 does not divide the 5 layers of {folder}; use one of 1, 5, or set ")
