"""Changes that make a weight sync faster: which are offered, and their predicted seconds."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_mega.cli.sync_remedies import ROUND_SECONDS, remedies, sync_seconds
from grpo_mega.config.schema import Config
from grpo_mega.types import UserError
from tests.helpers.planner_cases import config_of

MIB = 2**20


def summary(*, between: float = 5e9, inside: float = 0.0, buckets: int = 10, transfers: int = 1000) -> dict[str, Any]:
    links = {"same_node": int(inside), "across_nodes": int(between)}
    return {
        "busiest_link_bytes": links,
        "bytes_by_link": {"same_process": 0} | links,
        "speeds_gb_per_second": {"same_node": 450.0, "across_nodes": 50.0},
        "buckets": buckets,
        "transfers": transfers,
    }


def no_other_layout(config: Config) -> dict[str, Any]:
    raise UserError(f"engine.tp={config.engine.tp} does not divide the heads")


def found(config: Config, before: dict[str, Any], **options: Any) -> list[Any]:
    options = {"replan": no_other_layout, "on_cpu": False, "search": False} | options
    return remedies(config, before, options.pop("replan"), **options)


def test_seconds_are_those_of_the_busiest_link_and_of_the_rounds() -> None:
    assert sync_seconds(summary(), "auto") == pytest.approx(5e9 / 50e9 + 10 * ROUND_SECONDS)
    assert sync_seconds(summary(inside=9e10, buckets=0), "nccl") == pytest.approx(9e10 / 450e9)
    assert sync_seconds(summary(buckets=0), "gloo") == pytest.approx(5e9 / 0.46e9)


def test_small_buckets_are_enlarged_until_rounds_take_a_tenth() -> None:
    config = config_of(weight_sync={"bucket_bytes": 16 * MIB})
    (larger,) = found(config, summary(buckets=160))  # 0.1 s of bytes and 0.32 s of rounds
    assert larger.change == {"weight_sync.bucket_bytes": 512 * MIB}
    assert larger.before_seconds == pytest.approx(0.42)
    assert larger.after_seconds == pytest.approx(0.1 + 5 * ROUND_SECONDS)
    assert "about 5 instead of 160 rounds" in larger.text
    assert "1074 MB of buffers" in larger.text
    assert "0.420 to 0.110 s" in larger.text
    assert larger.as_json()["overrides"] == [f"weight_sync.bucket_bytes={512 * MIB}"]
    assert found(config_of(), summary(buckets=4)) == []


def test_a_transport_through_the_host_is_replaced_on_gpus_only() -> None:
    config = config_of(weight_sync={"transport": "gloo"})
    (faster,) = found(config, summary(buckets=1))
    assert faster.change == {"weight_sync.transport": "auto"}
    assert faster.after_seconds == pytest.approx(0.1 + ROUND_SECONDS)
    assert faster.before_seconds > 100 * faster.after_seconds
    assert found(config, summary(buckets=1), on_cpu=True) == []


def test_an_engine_layout_that_sends_less_between_nodes_is_offered_with_its_bytes() -> None:
    config = config_of(run={"world_size": 16}, parallel={"tp": 4, "sequence_parallel": True}, engine={"tp": 8})
    planned: list[int] = []

    def replan(changed: Config) -> dict[str, Any]:
        planned.append(changed.engine.tp)
        return summary(between=1e9 if changed.engine.tp == 4 else 6e9, buckets=1)

    (other,) = found(config, summary(buckets=1), replan=replan)
    assert planned == [4, 16]  # the policy's tp, which is also half of the engine's, and the double
    assert other.change == {"engine.tp": 4}
    assert other.after_seconds == pytest.approx(1e9 / 50e9 + ROUND_SECONDS)
    assert "1.0 instead of 5.0 GB between nodes" in other.text


def test_plans_of_many_transfers_are_made_again_only_when_asked() -> None:
    config = config_of(run={"world_size": 16}, engine={"tp": 8})

    def replan(changed: Config) -> dict[str, Any]:
        return summary(between=1e9, buckets=1)

    many = summary(buckets=1, transfers=2_000_000)
    assert found(config, many, replan=replan) == []
    assert {each.change["engine.tp"] for each in found(config, many, replan=replan, search=True)} == {1, 4, 16}
