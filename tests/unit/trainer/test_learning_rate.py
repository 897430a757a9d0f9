"""The learning rate of every update: numbers worked by hand, Megatron-Core's scheduler, and the rules of its keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_mega.config.load import load_config
from grpo_mega.config.policy_sections import OptimizerConfig
from grpo_mega.config.schema import TrainConfig
from grpo_mega.trainer.learning_rate import LearningRateSchedule
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
PLAIN = ("optimizer.decay_updates=null", "optimizer.min_lr=0.0", "optimizer.lr=8.0e-5", "train.steps=20",
         "train.minibatches_per_epoch=1")  # fmt: skip


def schedule_of(steps: int = 1, minibatches: int = 1, **keys: Any) -> LearningRateSchedule:
    train = TrainConfig(steps=steps, minibatches_per_epoch=minibatches)
    return LearningRateSchedule.of(OptimizerConfig(**keys), train)


@pytest.mark.parametrize(
    ("keys", "rates"),
    [
        ({}, [8, 8, 8, 8, 8, 8, 8]),
        ({"warmup_updates": 4}, [2, 4, 6, 8, 8, 8, 8]),
        ({"schedule": "constant", "warmup_updates": 2}, [4, 8, 8, 8, 8, 8, 8]),
        ({"decay_updates": 4}, [8, 6, 4, 2, 0, 0, 0]),
        ({"decay_updates": 6, "warmup_updates": 2, "min_lr": 4.0}, [4, 8, 8, 7, 6, 5, 4]),
        ({"schedule": "linear"}, [8, 7, 6, 5, 4, 3, 2]),
        # cos(pi x) is 1, 1/2, 0, -1/2, -1 at x = 0, 1/3, 1/2, 2/3, 1
        ({"schedule": "cosine", "decay_updates": 6}, [8, None, 6, 4, 2, None, 0]),
        ({"schedule": "cosine", "warmup_fraction": 0.25, "min_lr": 2.0}, [4, 8, 8, None, 6.5, 5, 3.5]),
    ],
)
def test_the_rates_are_those_computed_by_hand(keys: dict[str, Any], rates: list[float | None]) -> None:
    """The run has 4 steps of 2 updates, and its largest rate is 8."""
    schedule = schedule_of(steps=4, minibatches=2, lr=8.0, **keys)
    for done, rate in enumerate(rates):
        if rate is not None:
            assert schedule.rate(done) == pytest.approx(rate, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("fraction", "steps", "updates"), [(0.1, 30, 3), (0.3, 10, 3), (0.29, 10, 2), (0.05, 400, 20)])
def test_a_fraction_is_rounded_down_to_whole_updates(fraction: float, steps: int, updates: int) -> None:
    assert schedule_of(steps=steps, warmup_fraction=fraction).warmup == updates


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_warm_up_and_decay_are_those_of_megatron_core(shape: str, warmup: int) -> None:
    """Megatron-Core counts one update less while it warms up: its first update has the rate 0."""
    from grpo_mega.policy.megatron_patches import cpu

    cpu.prepare_import()
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    group: dict[str, Any] = {}
    theirs = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]), init_lr=0.0, max_lr=3e-4, min_lr=1e-5, lr_warmup_steps=warmup,
        lr_decay_steps=50, lr_decay_style=shape, start_wd=0.0, end_wd=0.0, wd_incr_steps=1, wd_incr_style="constant",
    )  # fmt: skip
    rates = []
    for _ in range(60):
        rates.append(group["lr"])
        theirs.step(1)
    ours = schedule_of(60, schedule=shape, lr=3e-4, min_lr=1e-5, warmup_updates=warmup, decay_updates=50)
    expected = [*rates[1 : warmup + 1], *rates[warmup:-1]][:59]
    assert [ours.rate(done) for done in range(59)] == pytest.approx(expected, rel=1e-12)


def test_the_decay_ends_at_the_minimum_and_stays_there() -> None:
    schedule = schedule_of(5, schedule="cosine", lr=1.0, min_lr=0.25, decay_updates=3)
    assert [schedule.rate(done) for done in (3, 4, 1000)] == [0.25, 0.25, 0.25]
    assert math.isclose(schedule.rate(2), 0.25 + 0.75 * 0.25)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.warmup_updates=3", "optimizer.warmup_fraction=0.1"],
         ["optimizer.warmup_updates=3", "optimizer.warmup_fraction=0.1", "remove one"]),
        (["optimizer.warmup_fraction=0.01"], ["optimizer.warmup_fraction=0.01", "20 updates", "raise it"]),
        (["optimizer.schedule=constant", "optimizer.decay_updates=9"],
         ["optimizer.decay_updates=9", "optimizer.schedule=constant", "optimizer.schedule=linear"]),
        (["optimizer.min_lr=1e-6"], ["optimizer.min_lr=1e-06", "does nothing", "optimizer.schedule=linear"]),
        (["optimizer.schedule=cosine", "optimizer.min_lr=1"], ["optimizer.min_lr=1.0", "optimizer.lr=8e-05", "lower"]),
        (["optimizer.decay_updates=5", "optimizer.warmup_updates=5"],
         ["optimizer.decay_updates=5", "warm-up of 5 updates", "6 or more"]),
        (["optimizer.schedule=cosine", "optimizer.warmup_updates=20"], ["20", "warm-up of 20 updates", "train.steps"]),
        (["optimizer.schedule=cosine", "optimizer.decay_updates=15"],
         ["optimizer.decay_updates=15", "last 5 of 20 updates", "optimizer.min_lr"]),
        (["optimizer.schedule=polynomial"], ["optimizer.schedule='polynomial'", "cosine"]),
        (["optimizer.warmup_fraction=1"], ["optimizer.warmup_fraction=1", "less than 1"]),
    ],
)  # fmt: skip
def test_a_wrong_schedule_is_an_error_that_says_what_to_do(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(QUICKSTART, [*PLAIN, *overrides])
    assert_names(error.value, *words)


@pytest.mark.parametrize(
    ("keys", "depends"),
    [
        ({}, False),
        ({"decay_updates": 5}, False),
        ({"schedule": "cosine", "decay_updates": 5, "warmup_updates": 2}, False),
        ({"schedule": "cosine"}, True),
        ({"warmup_fraction": 0.1}, True),
        ({"schedule": "constant"}, False),
    ],
)
def test_a_schedule_depends_on_the_length_of_the_run_exactly_if_its_rates_do(
    keys: dict[str, Any], depends: bool
) -> None:
    assert OptimizerConfig(**keys).depends_on_run_length == depends
    rates: Callable[[int], list[float]] = lambda steps: [schedule_of(steps, **keys).rate(i) for i in range(40)]  # noqa: E731
    assert (rates(40) != rates(80)) == depends


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({}, "0.001"),
        ({"warmup_updates": 3}, "rises to 0.001 over 3 update(s), then stays there"),
        ({"schedule": "cosine", "min_lr": 1e-5}, "0.001, cosine decay to 1e-05 at update 9"),
        ({"warmup_updates": 3, "decay_updates": 8},
         "rises to 0.001 over 3 update(s), then linear decay to 0 at update 8"),
    ],
)  # fmt: skip
def test_the_log_describes_the_schedule(keys: dict[str, Any], text: str) -> None:
    assert schedule_of(9, lr=1e-3, **keys).describe() == text
