"""policy/fp8_histories.py: a skipped update leaves the state of the delayed recipe as it was, also what it infected.

The update of histories and scales is Transformer Engine's own code, `_amax_and_scale_update` of 2.20.2.
"""

from __future__ import annotations

import ast
import zipfile
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_mega.policy.fp8_histories import Fp8Histories
from grpo_mega.policy.learner import MegatronLearner
from grpo_mega.types import UpdateStats
from tests.helpers.transformer_engine_sources import transformer_engine_wheel

NAMES = (
    "_default_sf_compute",
    "_update_amax_history",
    "_default_get_amax_and_update_history",
    "_compute_amax_and_update_history",
    "_compute_scaling_factor",
    "_amax_and_scale_update",
)


@pytest.fixture(scope="module")
def end_pass(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Transformer Engine's update of history and scale at the end of a pass."""
    with zipfile.ZipFile(transformer_engine_wheel(tmp_path_factory.mktemp("wheel"))) as wheel:
        source = wheel.read("transformer_engine/pytorch/quantization.py")
    functions = [each for each in ast.parse(source).body if getattr(each, "name", "") in NAMES]
    assert len(functions) == len(NAMES)
    for each in functions:
        each.decorator_list = []  # jit_fuser
    found: dict[str, Any] = {"torch": torch}
    annotations = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*annotations, *functions], []), "quantization.py", "exec"), found)
    recipe = SimpleNamespace(amax_compute_algo="max", scaling_factor_compute_algo=None, margin=0)

    def update(state: SimpleNamespace, largest: list[float]) -> None:
        state.amax_history[0].copy_(torch.tensor(largest))
        found["_amax_and_scale_update"](state.amax_history, state.scale, 448.0, recipe)

    return update


def make_layer() -> tuple[torch.nn.Module, SimpleNamespace]:
    state = SimpleNamespace(amax_history=torch.zeros(4, 2), scale=torch.ones(2))
    layer = torch.nn.Linear(2, 2)
    layer.fp8_meta = {"scaling_fwd": state, "recipe": None}  # type: ignore[assignment]
    return layer, state


def test_a_skipped_update_restores_histories_and_scales_in_place(end_pass: Any) -> None:
    layer, state = make_layer()
    view = state.amax_history[0]  # a quantizer holds it
    for largest in ([2.0, 4.0], [3.0, 1.0]):
        end_pass(state, largest)
    before = state.amax_history.clone(), state.scale.clone()
    histories = Fp8Histories([torch.nn.Sequential(layer)])
    end_pass(state, [float("inf"), 9.0])
    assert not torch.isfinite(state.amax_history).all()
    histories.restore()
    assert torch.equal(state.amax_history, before[0])
    assert torch.equal(state.scale, before[1])
    end_pass(state, [8.0, 4.0])
    assert state.scale.tolist() == [448 / 8, 448 / 4]  # with an infinite value in the history the first would not move
    assert view.data_ptr() == state.amax_history.data_ptr()


def test_without_the_restoration_a_value_that_is_not_finite_holds_the_scale(end_pass: Any) -> None:
    """The reason for the restoration, in Transformer Engine's code."""
    _, state = make_layer()
    end_pass(state, [2.0, 4.0])
    end_pass(state, [float("inf"), 9.0])
    end_pass(state, [8.0, 4.0])
    assert state.scale[0].item() == 448 / 2


def test_a_state_that_the_skipped_update_made_gets_its_initial_values() -> None:
    layer = torch.nn.Linear(2, 2)
    histories = Fp8Histories([layer])
    made, state = make_layer()
    layer.fp8_meta = made.fp8_meta
    state.amax_history.fill_(float("nan"))
    state.scale.fill_(7.0)
    histories.restore()
    assert state.amax_history.eq(0).all()
    assert state.scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("is_allowed", [False, True])
def test_the_learner_restores_them_only_if_the_update_is_skipped(is_allowed: bool) -> None:
    restored: list[bool] = []
    memory = SimpleNamespace(changed=lambda: None)
    optimizer = SimpleNamespace(param_groups=[], step=lambda: None)
    learner: Any = SimpleNamespace(
        _fp8_histories=SimpleNamespace(restore=lambda: restored.append(True)),
        _require=lambda *_: None,
        _memory=memory,
        parts=SimpleNamespace(optimizer=optimizer),
        _host_threads=None,
        _overlaps_gather=False,
    )
    stats = MegatronLearner._step_if_allowed(learner, UpdateStats(1.0, 0.0, {}, {}), 0.1, lambda _: is_allowed)
    assert restored == ([] if is_allowed else [True])
    assert stats.is_made is is_allowed
