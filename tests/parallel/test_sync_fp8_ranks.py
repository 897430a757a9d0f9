"""FP8 syncs between real ranks, from Megatron policies of several layouts to regions of vLLM's recorded FP8 loader.

The engines' values are bit-equal to gathering the bf16 weights and quantizing them afterwards.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.cli.fp8_report import report_of
from grpo_mega.config.rollout_sections import EngineConfig
from grpo_mega.config.schema import WeightSyncConfig
from grpo_mega.engines.weights.loader_recording import LoaderRecord
from grpo_mega.engines.weights.regions import PlainRegion, Regions, region_view
from grpo_mega.engines.weights.sink import RegionSink
from grpo_mega.interfaces import SinkRegion
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import Placement, TensorSlice, WeightMismatchError
from tests.helpers.family_configs import raw_family_config
from tests.helpers.fp8_models import FP8_MODELS, fp8_tensors_of, record_fp8
from tests.helpers.one_process import run
from tests.helpers.ranks import RankPool
from tests.helpers.recorded_rollouts import Layout, Recorded, make_config
from tests.helpers.tiny_models import make_family_model

WORLD, ENGINE_TP, BUCKET_BYTES = 4, 2, 64 * 1024


@dataclass(frozen=True)
class Case:
    """A model, its policy's layout, and the traces of vLLM's loader on the two ranks of an engine."""

    layout: Layout
    spread: bool
    power_of_two: bool
    model: Path = Path()
    records: tuple[LoaderRecord, ...] = ()
    tensors: tuple[str, ...] = ()


# without a GPU, tensor parallelism splits latent projections inside blocks
CASES: dict[str, Case] = {
    "qwen3": Case(Layout(WORLD, tp=2, pp=2), False, False),
    "qwen3_moe": Case(Layout(WORLD, tp=2, sequence_parallel=True, ep=2), False, True),
    "deepseek_v3": Case(Layout(WORLD, pp=2, ep=2), True, False),
}


@pytest.fixture(scope="module")
def cases(recorder: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    found = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        make_family_model(folder, raw_family_config(name, **FP8_MODELS[name]))
        records = run(recorder, record_fp8, folder, ENGINE_TP, list(range(ENGINE_TP)), case.spread)
        found[name] = replace(case, model=folder, records=tuple(records), tensors=tuple(fp8_tensors_of(folder)))
    return found


class RecordedSink(RegionSink):
    """vLLM's parameters of one rank in plain memory, with an optional `fault` in an update."""

    def __init__(self, record: LoaderRecord, streaming_reason: str | None = None) -> None:
        dtypes = {copy.local.name: copy.dtype for copy in record.copies}
        self.parameters = {name: torch.zeros(record.shapes[name], dtype=dtype) for name, dtype in dtypes.items()}
        self.copies, self.fault = record.copies, ""
        self.loaded: dict[str, torch.dtype] = {}
        regions = [SinkRegion(Placement(c.hf, c.local), "plain", c.dtype) for c in record.copies]
        places = [PlainRegion(region_view(self.parameters[c.local.name], c)) for c in record.copies]
        streamed = streaming_reason is not None
        super().__init__(Regions([], [], []) if streamed else Regions(regions, places, []), streaming_reason)

    def write(self, hf: TensorSlice, values: Tensor) -> None:
        if not (self.fault == "stale" and hf.name.endswith("0.self_attn.o_proj.weight_scale_inv")):
            super().write(hf, values)

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        return None if self.fault == "stale" else super().memory_of(hf)

    def load(self, name: str, tensor: Tensor) -> None:
        self.loaded[name] = tensor.dtype
        for copy in self.copies:
            if copy.hf.name == name:
                region_view(self.parameters[copy.local.name], copy).copy_(tensor[copy.hf.index])

    def _finish_update(self, policy_version: int) -> None:
        if self.fault == "flipped":
            as_bits(self.parameters["model.layers.1.self_attn.o_proj.weight"])[5] ^= 1

    def differing(self, expected: dict[str, Tensor]) -> list[str]:
        """Return the regions whose bits differ from these whole tensors."""
        return [
            str(copy.hf)
            for copy in self.copies
            if not torch.equal(
                as_bits(region_view(self.parameters[copy.local.name], copy).contiguous()),
                as_bits(expected[copy.hf.name][copy.hf.index].to(copy.dtype).contiguous()),
            )
        ]


def as_bits(values: Tensor) -> Tensor:
    return values.view(-1).view(torch.uint8)


def open_ends(rank: int, case: Case, fp8: str | None = "scales", **sink: Any) -> tuple[Any, RecordedSink, Any]:
    """Return policy, sink and sync as a job builds them. `fp8="scales"` uses the kind of scales of the case."""
    from grpo_mega.models.config_readers import read_spec
    from grpo_mega.policy.policy import MegatronPolicy
    from grpo_mega.trainer.build import make_sync

    if fp8 == "scales":
        fp8 = "scales_power_of_two" if case.power_of_two else "scales_fp32"
    recorded = Recorded(case.model, None, [], [], [], dtype="bf16")  # type: ignore[arg-type]
    engine = EngineConfig(tp=ENGINE_TP, ep=ENGINE_TP if case.spread else 1, fp8=fp8)  # type: ignore[arg-type]
    sections = {"engine": engine, "weight_sync": WeightSyncConfig(bucket_bytes=BUCKET_BYTES)}
    config = make_config(recorded, case.layout).model_copy(update=sections)
    topology = Topology.of(config, WORLD)
    ranks = Ranks(topology, topology.coordinates(rank), torch.device("cpu"))
    policy = MegatronPolicy(config, read_spec(case.model), case.model, ranks, with_reference=False)
    end = RecordedSink(case.records[rank % ENGINE_TP], **sink)
    local_engine: Any = SimpleNamespace(sink=end, sync_peers=lambda *_args, **_settings: None)
    return policy, end, make_sync(config, policy, local_engine, ranks)


def quantized_checkpoint(policy: Any, case: Case) -> dict[str, Tensor]:
    """Return the FP8 checkpoint of the gathered bf16 weights, computed block by block from its definition."""
    found: dict[str, Tensor] = {}
    for name, values in policy.full_tensors(1 << 24):
        found[name] = values.clone()
        if name + "_scale_inv" not in case.tensors:
            continue
        rows, columns = values.shape
        scales = torch.empty(-(-rows // 128), -(-columns // 128))
        quantized = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block_index = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                block = values[block_index].float()
                scale = block.abs().max() / 448.0
                scales[i, j] = 2.0 ** torch.log2(scale).ceil() if case.power_of_two else scale
                quantized[block_index] = (block / scales[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
        found[name], found[name + "_scale_inv"] = quantized, scales
    return found


def run_syncs(rank: int, case: Case) -> dict[str, Any]:
    policy, sink, sync = open_ends(rank, case)
    reports, wrong, scales = [], [], []
    for version in (1, 2):
        reports.append(sync.push(version, verify=True))
        wrong += sink.differing(quantized_checkpoint(policy, case))
        scales.append(next(p for name, p in sink.parameters.items() if "scale_inv" in name).clone())
        for parameter in policy.parts.parameters:
            parameter.data.mul_(1.37)
    return {
        "wrong": wrong,
        "reports": reports,
        "stored": sum(p.nbytes for p in sink.parameters.values()),
        "filled": sum(region_view(sink.parameters[c.local.name], c).nbytes for c in sink.copies),
        "scales_changed": not torch.equal(*scales),
        "received": int(sync.plan.traffic.received_bytes()[rank]),
        "quantized": sum(p.itemsize == 1 for p in sink.parameters.values()),
    }


@pytest.mark.parametrize("name", CASES)
def test_engines_hold_the_quantized_gathered_weights_at_each_version(
    rank_pool: RankPool, cases: dict[str, Case], name: str
) -> None:
    for seen in rank_pool.call(WORLD, run_syncs, cases[name]):
        assert seen["wrong"] == []
        assert seen["quantized"] >= 6
        assert seen["scales_changed"], "scales are those of the previous version"
        first, second = seen["reports"]
        assert first.policy_digest != second.policy_digest
        assert first.written_bytes == second.written_bytes == seen["filled"] == seen["stored"]
        assert 0 < first.received_bytes == seen["received"] < first.written_bytes


def run_streaming(rank: int, case: Case) -> tuple[int, list[str], dict[str, torch.dtype]]:
    """Return the number of pushes, the regions that differ, and the dtypes of the streamed tensors."""
    policy, sink, sync = open_ends(rank, case, streaming_reason="its loader computes")
    sync.push(1, verify=True)
    return sync.count, sink.differing(quantized_checkpoint(policy, case)), sink.loaded


def test_a_streamed_engine_receives_the_same_values_and_scales(rank_pool: RankPool, cases: dict[str, Case]) -> None:
    for count, wrong, loaded in rank_pool.call(WORLD, run_streaming, cases["qwen3"]):
        assert (count, wrong) == (1, [])
        assert list(loaded) == list(cases["qwen3"].tensors)


def collect_errors(rank: int, case: Case) -> list[str]:
    _, sink, sync = open_ends(rank, case)
    errors = []
    for version, fault in enumerate(["", "flipped", "stale", ""], 1):
        sink.fault = fault if rank == 1 else ""
        if fault == "stale":
            for parameter in sync._source._source._parameters.values():
                parameter.data.mul_(1.37)
        try:
            sync.push(version, verify=True)
            errors.append("")
        except WeightMismatchError as error:
            errors.append(str(error))
    return errors


def test_a_flipped_value_and_an_outdated_scale_are_named_on_every_rank(
    rank_pool: RankPool, cases: dict[str, Case]
) -> None:
    for fine, flipped, stale, after in rank_pool.call(WORLD, collect_errors, cases["qwen3"]):
        assert fine == after == ""
        assert "model.layers.1.self_attn.o_proj.weight[" in flipped
        assert "on rank 1" in flipped
        assert "model.layers.0.self_attn.o_proj.weight_scale_inv[" in stale
        assert "on rank 1" in stale
        assert "rank 3: the engine" not in flipped + stale


def write_reports(rank: int, case: Case, folder: Path) -> None:
    from grpo_mega.observe.run_folder import RunFolder
    from grpo_mega.trainer.build import report_fp8

    policy, _, _ = open_ends(rank, case)
    scales = "scales_power_of_two" if case.power_of_two else "scales_fp32"
    config = SimpleNamespace(engine=SimpleNamespace(fp8=scales), weight_sync=SimpleNamespace(fp8_report=True))
    report_fp8(config, policy, RunFolder(folder), is_first=rank == 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_the_report_of_a_run_equals_that_of_the_policys_files(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, name: str
) -> None:
    rank_pool.call(WORLD, write_reports, cases[name], tmp_path)
    found = json.loads((tmp_path / "fp8_report.json").read_text())
    expected = report_of(cases[name].model, power_of_two=cases[name].power_of_two)
    assert list(found) == list(expected)
    for matrix, errors in expected.items():
        assert found[matrix] == pytest.approx(errors, rel=1e-12), matrix


def error_of_sync(rank: int, case: Case, fp8: str | None) -> str:
    record = case.records[rank % ENGINE_TP]
    if fp8:  # the policy sends quantized values, the engine expects bf16
        copies = [
            mock.Mock(hf=c.hf, local=c.local, along=c.along, dtype=torch.bfloat16 if c.dtype.itemsize == 1 else c.dtype)
            for c in record.copies
        ]
        record = LoaderRecord(record.shapes, record.addresses, copies)  # type: ignore[arg-type]
    try:
        open_ends(rank, replace(case, records=(record,) * ENGINE_TP), fp8=fp8)
    except WeightMismatchError as error:
        return str(error)
    finally:
        dist.barrier()
    return ""


@pytest.mark.parametrize(
    ("fp8", "words"),
    [
        ("scales", "in torch.float8_e4m3fn, but the engine needs it in torch.bfloat16"),
        (None, "_scale_inv[0:2, 0:2] on rank 0: the policy does not have this tensor"),
    ],
)
def test_quantized_values_on_one_side_only_are_rejected_before_the_first_push(
    rank_pool: RankPool, cases: dict[str, Case], fp8: str | None, words: str
) -> None:
    for error in rank_pool.call(WORLD, error_of_sync, cases["qwen3"], fp8):
        assert words in error
