"""Recording of vLLM's loader in one process for any rank, compared with a hand-written table and with real loading."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from grpo_mega.engines.vllm.recording_loader import record_vllm
from grpo_mega.engines.vllm.regions import by_expert
from grpo_mega.engines.weights.loader_recording import (
    CannotRecordError,
    LoaderRecord,
    RecordedCopy,
    UnfilledError,
    record_loader,
)
from grpo_mega.engines.weights.regions import Zeros, region_view
from grpo_mega.models.config_readers import read_spec
from grpo_mega.types import TensorSlice
from tests.helpers.family_configs import raw_family_config
from tests.helpers.one_process import run
from tests.helpers.tiny_models import make_family_model, make_tiny_model
from tests.helpers.vllm_table import engine_layout


def record(folder: Path, tp: int, ranks: list[int]) -> list[LoaderRecord]:
    from grpo_mega.engines.vllm.arguments import checkpoint_tensors
    from grpo_mega.engines.vllm.offline import record_ranks

    tensors = checkpoint_tensors(read_spec(folder), torch.float32)
    return record_ranks(folder, tensors, dtype="fp32", tp=tp, ranks=ranks)


@pytest.mark.parametrize(
    ("family", "tied", "tp"), [("qwen3", False, 4), ("qwen3", True, 2), ("qwen2", False, 4), ("llama", False, 1)]
)
def test_the_record_of_every_rank_equals_the_table(
    recorder: ProcessPoolExecutor, tmp_path: Path, family: Any, tied: bool, tp: int
) -> None:
    """At tp=4 two ranks share a KV head, and the last rank has no row of a vocabulary of 70, padded to 128."""
    folder = make_tiny_model(tmp_path, family, tied, vocab=70)
    for rank, found in enumerate(run(recorder, record, folder, tp, list(range(tp)))):
        table = engine_layout(read_spec(folder), tp, rank, packed_head=False)
        assert {(c.hf, c.local) for c in found.copies} == {(r.placement.hf, r.placement.local) for r in table}


def recorded_copies(folder: Path, tp: int, dp: int, spread: bool) -> tuple[list[list[TensorSlice]], dict[str, Any]]:
    from grpo_mega.engines.vllm.arguments import checkpoint_tensors
    from grpo_mega.engines.vllm.offline import record_ranks

    tensors = checkpoint_tensors(read_spec(folder), torch.float32)
    ranks = list(range(tp * dp))
    records = record_ranks(folder, tensors, dtype="fp32", tp=tp, dp=dp, ranks=ranks, experts_spread=spread)
    return [[copy.hf for copy in record.copies] for record in records], tensors


@pytest.mark.parametrize(
    ("family", "tp", "dp", "spread"),
    [
        ("qwen3_moe", 2, 2, True),
        ("qwen3_moe", 2, 2, False),
        ("qwen3_moe", 2, 8, True),
        ("qwen3_moe", 4, 4, True),
        ("deepseek_v3", 2, 6, True),
        ("deepseek_v3", 1, 16, True),
    ],
)
def test_copies_share_experts_replicate_the_rest_and_are_derived_from_four_ranks(
    recorder: ProcessPoolExecutor, tmp_path: Path, family: str, tp: int, dp: int, spread: bool
) -> None:
    from grpo_mega.engines.vllm.layout_extrapolation import layouts_of_all, sampled_ranks
    from grpo_mega.models.engine_memory import engine_weight_bytes
    from grpo_mega.parallel.topology import Topology

    experts = {"deepseek_v3": {"n_routed_experts": 48, "topk_method": "noaux_tc"}, "qwen3_moe": {"num_experts": 16}}
    config = raw_family_config(family, moe_intermediate_size=64, vocab_size=121, **experts[family])
    folder = make_family_model(tmp_path, config)
    found, tensors = run(recorder, recorded_copies, folder, tp, dp, spread)
    held = [sum(math.prod(part.shape) for part in slices) for slices in found]
    sizes = {name: math.prod(shape) for name, (shape, _) in tensors.items()}
    for name, size in sizes.items():
        times = sum(math.prod(p.shape) for slices in found for p in slices if p.name == name) / size
        expected = (1,) if ".experts." in name else (dp, 2 * dp, tp * dp)  # split over tp, or few KV heads, or whole
        assert times in expected, name
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    layouts = layouts_of_all({r: found[r] for r in sampled_ranks(tp * dp, tp)}, shapes, tp * dp, tp)
    assert [layout.slices() for layout in layouts] == found
    spec = read_spec(folder)
    predicted = engine_weight_bytes(spec, Topology(tp * dp, engine_tp=tp, engine_dp=dp), 4, spread=spread) / 4
    absorbed = sum(size for name, size in sizes.items() if name.endswith(".kv_b_proj.weight")) / tp
    assert max(held) + absorbed == pytest.approx(predicted, rel=0.02)  # the vocabulary is not a multiple of 64


# Architectures that have no parameter table.


def make_unknown_model(folder: Path, architecture: str) -> Path:
    from transformers import MambaConfig, Phi3Config

    sizes = {"vocab_size": 70, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 128}
    if architecture == "Phi3ForCausalLM":
        config: Any = Phi3Config(**sizes, num_key_value_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=1)
    else:
        config = MambaConfig(vocab_size=70, hidden_size=128, num_hidden_layers=2)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


def compare_with_loading(folder: Path, tp: int, rank: int) -> tuple[int, list[str]]:
    """Load real weights and return the number of copies and the regions that differ from their checkpoint slice."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from grpo_mega.engines.vllm import offline

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tensors = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    kept: list[nn.Module] = []

    def keep(built: nn.Module, tensors: Any) -> LoaderRecord:
        record = record_vllm(built, tensors)
        kept.append(built)
        built.load_weights(iter(weights.items()))  # type: ignore[operator]
        return record

    with (
        mock.patch.object(offline, "record_vllm", keep),
        mock.patch.object(offline, "_FloatsOnMeta", mock.MagicMock),
    ):
        (record,) = offline.record_ranks(folder, tensors, dtype="fp32", tp=tp, ranks=[rank])
    parameters = dict(kept[0].named_parameters())
    wrong = [
        str(copy.hf)
        for copy in record.copies
        if not torch.equal(region_view(parameters[copy.local.name].data, copy), weights[copy.hf.name][copy.hf.index])
    ]
    return len(record.copies), wrong


@pytest.mark.parametrize("rank", [0, 1])
def test_a_model_without_a_table_is_recorded_as_its_loader_loads_it(
    recorder: ProcessPoolExecutor, tmp_path: Path, rank: int
) -> None:
    """The checkpoint of Phi3 has q, k, v in one tensor and gate, up in another; its loader splits them."""
    folder = make_unknown_model(tmp_path, "Phi3ForCausalLM")
    count, wrong = run(recorder, compare_with_loading, folder, 2, rank)
    assert wrong == []
    assert count == 2 * (3 + 1 + 2 + 1 + 2) + 3  # two layers; embedding, norm, head


def record_unknown(folder: Path) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    from grpo_mega.engines.vllm.offline import record_ranks

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tensors = {name: (tuple(p.shape), torch.float32) for name, p in model.named_parameters()}
    try:
        record_ranks(folder, tensors, dtype="fp32", tp=1, ranks=[0])
    except CannotRecordError as error:
        return str(error)
    return ""


def test_a_loader_that_computes_cannot_be_recorded_and_names_the_parameter(
    recorder: ProcessPoolExecutor, tmp_path: Path
) -> None:
    message = run(recorder, record_unknown, make_unknown_model(tmp_path, "MambaForCausalLM"))
    assert "mixer.A is written by" in message  # A = -exp(A_log)


# Small loaders that are recorded in this process.


class Loader(nn.Module):
    def __init__(self, load: Callable[[Any, dict[str, torch.Tensor]], None]) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.zeros(2, 6, 4), requires_grad=False)
        self._load = load

    def load_weights(self, weights: Any) -> None:
        self._load(self.fused.data, dict(weights))


TENSORS = {"a": ((3, 8), torch.float32), "b": ((4, 6), torch.float32)}


def record_loading(load: Callable[[Any, dict[str, torch.Tensor]], None]) -> LoaderRecord:
    return record_loader(Loader(load), TENSORS, set())


def recorded_copies_of(load: Callable[[Any, dict[str, torch.Tensor]], None]) -> list[RecordedCopy]:
    return record_loading(load).copies


def halves_and_transposed(fused: Any, w: dict[str, torch.Tensor]) -> None:
    fused[0, :3].copy_(w["a"].narrow(1, 4, 4))
    fused[0, 3:].copy_(w["a"].chunk(2, 1)[0])
    fused[1].copy_(w["b"].t())


def test_halves_and_transposed_slices_are_recorded_with_their_dimensions() -> None:
    copies = recorded_copies_of(halves_and_transposed)
    assert [(str(c.hf), str(c.local), c.along) for c in copies] == [
        ("a[0:3, 4:8]", "fused[0:1, 0:3, 0:4]", (1, 2)),
        ("a[0:3, 0:4]", "fused[0:1, 3:6, 0:4]", (1, 2)),
        ("b[0:4, 0:6]", "fused[1:2, 0:6, 0:4]", (2, 1)),
    ]
    real = {"a": torch.arange(24.0).view(3, 8), "b": torch.arange(24.0).view(4, 6) + 100}
    loaded = Loader(halves_and_transposed)
    loaded.load_weights(real.items())
    for copy in copies:
        assert torch.equal(region_view(loaded.fused.data, copy), real[copy.hf.name][copy.hf.index])


def in_another_order(fused: Any, w: dict[str, torch.Tensor]) -> None:
    fused[0, :3].copy_(w["a"].narrow(1, 4, 4))
    fused[0, 3:].copy_(w["a"].chunk(2, 1)[0])
    fused[1].copy_(w["b"].permute(1, 0).contiguous())


def test_a_contiguous_copy_of_a_slice_is_recorded_as_the_slice() -> None:
    assert recorded_copies_of(in_another_order) == recorded_copies_of(halves_and_transposed)


def zeroed(fused: Any, w: dict[str, torch.Tensor]) -> None:
    fused[0, :3].copy_(w["a"].narrow(1, 4, 4))
    fused[0, 3:].copy_(w["a"].chunk(2, 1)[0])
    fused[1].copy_(w["b"].zero_().t())


def test_a_part_that_another_rank_adds_is_recorded_as_zero() -> None:
    record = record_loading(zeroed)
    assert [str(copy.hf) for copy in record.copies] == ["a[0:3, 4:8]", "a[0:3, 0:4]"]
    assert [str(box) for box in record.zeros] == ["fused[1:2, 0:6, 0:4]"]


def padded_with_zeros(fused: Any, w: dict[str, torch.Tensor]) -> None:
    fused.zero_()  # elements that are copied later are not padding
    fused[0, :3].copy_(w["a"].narrow(1, 4, 4))
    fused[0, 3:].copy_(w["a"].chunk(2, 1)[0])
    fused[1, :4].copy_(w["b"].t()[:4])
    fused[1, 4:].zero_()
    fused[1, 6:].copy_(torch.zeros(0, 4))  # an empty copy


def test_padding_that_the_loader_zeroes_is_recorded_as_zero() -> None:
    record = record_loading(padded_with_zeros)
    assert [str(copy.local) for copy in record.copies][2:] == ["fused[1:2, 0:4, 0:4]"]
    assert [str(box) for box in record.zeros] == ["fused[1:2, 4:6, 0:4]"]


def test_zeros_are_written_and_verified() -> None:
    whole = torch.ones(2, 3)
    zeros = Zeros("bias", whole[1])
    assert zeros.difference() == "3 of 3 elements are not zero, although another rank adds them"
    zeros.rebuild()
    assert whole.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert zeros.difference() is None


def test_a_copy_into_several_experts_is_split_into_one_per_expert() -> None:
    """The checkpoint has [E, C, R], the engine [E, R, C]; this rank has experts 4 to 5 of 8."""
    whole = RecordedCopy(
        TensorSlice("w", (4, 0, 6), (2, 5, 3)), TensorSlice("p", (0, 0, 0), (2, 3, 5)), (0, 2, 1), torch.float32
    )
    assert [(str(c.hf), str(c.local), c.along) for c in by_expert(whole)] == [
        ("w[4:5, 0:5, 6:9]", "p[0:1, 0:3, 0:5]", (-1, 2, 1)),
        ("w[5:6, 0:5, 6:9]", "p[1:2, 0:3, 0:5]", (-1, 2, 1)),
    ]


def incomplete(fused: Any, w: dict[str, torch.Tensor]) -> None:
    fused[1].copy_(w["b"].t())


def twice(fused: Any, w: dict[str, torch.Tensor]) -> None:
    halves_and_transposed(fused, w)
    fused[0, 2:5].copy_(w["a"][:, :4])


def computed(fused: Any, w: dict[str, torch.Tensor]) -> None:
    fused[1].copy_(w["b"].t() * 2)


def added(fused: Any, w: dict[str, torch.Tensor]) -> None:
    fused[1].add_(torch.ones(6, 4))


def partly_zeroed(fused: Any, w: dict[str, torch.Tensor]) -> None:
    w["b"][:2].zero_()
    fused[1].copy_(w["b"].t())


def zeroed_after_a_copy(fused: Any, w: dict[str, torch.Tensor]) -> None:
    """Zero a tensor after a copy of it was made, which a recording cannot express."""
    kept = w["b"].clone()
    w["b"].zero_()
    fused[1].copy_(kept.t())


def every_other(fused: Any, w: dict[str, torch.Tensor]) -> None:
    fused[0, :3].copy_(w["a"][:, ::2])


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (incomplete, r"24 of the 48 elements of fused \[2, 6, 4\] are filled"),
        (twice, r"fused\[0:1, .* is filled twice"),
        (computed, "fused is written by aten.copy_.default, but not from a slice"),
        (added, "fused is written by aten.add_.Tensor"),
        (partly_zeroed, "b of the checkpoint is changed by aten.zero_"),
        (zeroed_after_a_copy, "b of the checkpoint is changed by aten.zero_"),
        (every_other, "fused is not filled by a slice of a"),
    ],
)
def test_a_loader_that_does_not_only_copy_slices_is_rejected(load: Callable[..., None], message: str) -> None:
    with pytest.raises(CannotRecordError, match=message):
        recorded_copies_of(load)


def nothing(fused: Any, w: dict[str, torch.Tensor]) -> None:
    del fused, w


def empty_slice(fused: Any, w: dict[str, torch.Tensor]) -> None:
    fused[0, :0].copy_(w["b"].t()[:0])
    fused[0:].fill_(0)


def test_a_padded_parameter_without_any_tensor_is_rejected() -> None:
    with pytest.raises(UnfilledError, match=r"no tensor of the checkpoint fills fused \[2, 6, 4\]"):
        record_loader(Loader(nothing), TENSORS, {"fused"})


def test_a_padded_parameter_into_which_the_loader_copies_an_empty_slice_is_padding_alone() -> None:
    record = record_loader(Loader(empty_slice), TENSORS, {"fused"})
    assert (record.copies, record.empty) == ([], {"fused"})


def test_a_parameter_that_the_engine_sets_itself_needs_no_tensor() -> None:
    assert record_loader(Loader(nothing), TENSORS, set(), preset={"fused"}).copies == []
    with pytest.raises(UnfilledError, match="24 of the 48"):
        record_loader(Loader(incomplete), TENSORS, set(), preset={"fused"})


def test_a_tied_parameter_that_the_loader_forgets_is_filled_by_its_tensor() -> None:
    loader = Loader(nothing)
    loader.fused.weight_loader = lambda fused, w: (fused[0].copy_(w.t()), fused[1].copy_(w.t()))
    copies = record_loader(loader, TENSORS, set(), tied={"fused": "b", "absent": "a"}).copies
    assert [(copy.hf.name, copy.local.offsets) for copy in copies] == [("b", (0, 0, 0)), ("b", (1, 0, 0))]


def test_only_the_last_rows_of_a_padded_parameter_may_stay_unfilled() -> None:
    def rows(fused: Any, w: dict[str, torch.Tensor]) -> None:
        fused[0].copy_(w["b"].t())

    (copy,) = record_loader(Loader(rows), TENSORS, {"fused"}).copies
    assert copy.local == TensorSlice("fused", (0, 0, 0), (1, 6, 4))
    with pytest.raises(CannotRecordError, match="24 of the 48"):
        record_loader(Loader(incomplete), TENSORS, {"fused"})
