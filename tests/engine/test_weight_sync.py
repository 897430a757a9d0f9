"""The weight sync from a real Megatron policy into a real vLLM on the same two ranks, and its verification.

All in fp32 on tiny random models. vLLM pads a vocabulary to a multiple of 64: with 70 tokens each of two ranks has
some, with 20 tokens the second has none.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from grpo_mega.trainer.phases import Phases
from grpo_mega.types import Completion, Prompt, Reward, Rollout, SamplingRequest, TensorSlice, WeightMismatchError
from tests.helpers.engine_contract import largest_log_prob_error, sglang_here
from tests.helpers.engine_ranks import EngineRanks, RankSession
from tests.helpers.family_configs import raw_family_config
from tests.helpers.servers import serving, write_config
from tests.helpers.synced_engine import (
    build,
    connect,
    expected_digest,
    largest_difference,
    perturb,
    push,
)
from tests.helpers.tiny_models import Family, make_family_model, make_tiny_model, store_head

SETTINGS: dict[str, Any] = {"max_model_len": 96, "max_num_seqs": 48, "kv_cache_tokens": None}
PROMPTS = [Prompt(i, "", tuple(2 + (3 * i + j * j) % 18 for j in range(n)), "") for i, n in enumerate([6, 1, 9])]
# Sizes that vLLM's CPU kernels support, fields that its router reads, and values that it hard-codes.
LATENT: dict[str, Any] = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "mixtral": {"head_dim": 32},
    "glm4_moe": {},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "gpt_oss": {"rms_norm_eps": 1e-5, "swiglu_limit": 7.0, "intermediate_size": 64},
}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LATENT_YARN = YARN | {"beta_fast": 4.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5}
# name -> (family, settings) of models with scaled rotary positions
SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-yarn": ("qwen2", {"hidden_size": 128, "rope_parameters": YARN}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN | {"beta_fast": 4.0}}),
    "llama-llama3": ("llama", {"hidden_size": 128, "rope_parameters": LLAMA3}),
    "latent-yarn": ("deepseek_v3", EXPERTS["deepseek_v3"] | {"rope_parameters": LATENT_YARN}),
}


@dataclass(frozen=True)
class Models:
    """Folders by name: with weights for the policy, and without weights for the engine."""

    policy: dict[str, Path]
    engine: dict[str, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    families: dict[str, tuple[Family, bool, int]] = {
        "qwen3": ("qwen3", False, 70),
        "qwen3-tied": ("qwen3", True, 70),
        "qwen2": ("qwen2", False, 20),
        "llama": ("llama", False, 70),
    }
    found = Models({}, {})
    for name, (family, tie, vocab) in families.items():
        found.policy[name] = make_tiny_model(root / name, family=family, tie=tie, vocab=vocab)
    for name, changes in EXPERTS.items():
        found.policy[name] = make_family_model(root / name, raw_family_config(name, **changes))
    for name, (of, changes) in SCALED.items():
        found.policy[name] = make_family_model(root / name, raw_family_config(of, **changes))
    all_experts = raw_family_config("qwen3_moe", mlp_only_layers=[])
    found.policy["sglang_moe"] = make_family_model(root / "sglang_moe", all_experts)
    found.policy["sglang_mixtral"] = make_family_model(root / "sglang_mixtral", raw_family_config("mixtral"))
    for name in found.policy:
        ignore = shutil.ignore_patterns("*.safetensors")
        found.engine[name] = Path(shutil.copytree(root / name, root / f"{name}-config", ignore=ignore))
    return found


# Functions that run on the ranks.


def largest_mismatch(session: RankSession) -> float:
    """Sample on every replica and return the largest difference to the policy's log-probs of the same tokens."""
    policy, rank = session.kept["policy"], session.rank
    sampling = SamplingRequest(4, 1.0, 8, seed=policy.ranks.at.replica)
    groups = session.engine.generate(PROMPTS, sampling)
    mine = [Rollout(p, c, Reward(0.0), rank) for p, group in zip(PROMPTS, groups, strict=True) for c in group]
    return largest_difference(policy, mine)


# Expected values.


def start(
    world: EngineRanks, models: Models, copy: Path, name: str, tp: int, pp: int, engine_tp: int, kind: str = "vllm"
) -> None:
    world.open(models.engine[name], tp=engine_tp, kind=kind, **SETTINGS)
    world.call(build, Path(shutil.copytree(models.policy[name], copy)), {"tp": tp, "pp": pp}, {"tp": engine_tp})


def check_two_syncs(
    world: EngineRanks, models: Models, copy: Path, name: str, tp: int, pp: int, engine_tp: int, kind: str = "vllm"
) -> None:
    """Push twice, the second time weights that only the policy has, and compare digests with the whole tensors."""
    start(world, models, copy, name, tp, pp, engine_tp, kind)
    assert not copy.exists()
    first = world.call(push, 0)
    assert world.call(largest_mismatch)[0] <= 1e-4
    world.call(perturb, 1)
    assert world.call(largest_mismatch)[0] > 1e-2  # the tolerance detects weights that did not change
    second = world.call(push, 1)
    assert world.call(largest_mismatch)[0] <= 1e-4
    assert {report.policy_digest for report in first} == {expected_digest(models.policy[name])}
    assert {report.policy_digest for report in second} == {expected_digest(models.policy[name], 1)}


# Opening an engine takes seconds; the order lets consecutive cases, and the faults below, share one.
@pytest.mark.parametrize(
    ("name", "tp", "pp", "engine_tp"),
    [
        pytest.param("qwen3", 2, 1, 1, id="qwen3-TP2-to-2xtp1", marks=pytest.mark.long),
        pytest.param("qwen2", 2, 1, 1, id="qwen2-TP2-to-2xtp1", marks=pytest.mark.long),
        pytest.param("llama", 2, 1, 1, id="llama-TP2-to-2xtp1", marks=pytest.mark.long),
        pytest.param("qwen3-tied", 1, 2, 2, id="qwen3-tied-PP2-to-tp2", marks=pytest.mark.long),
        pytest.param("qwen3-tied", 2, 1, 1, id="qwen3-tied-TP2-to-2xtp1"),
        pytest.param("qwen2", 1, 2, 2, id="qwen2-PP2-to-tp2"),
        pytest.param("qwen3", 1, 2, 2, id="qwen3-PP2-to-tp2", marks=pytest.mark.long),
        pytest.param("qwen3", 2, 1, 2, id="qwen3-TP2-to-tp2"),
    ],
)
def test_engines_receive_the_policys_weights_and_digests_equal_those_of_whole_tensors(
    world: EngineRanks, models: Models, tmp_path: Path, name: str, tp: int, pp: int, engine_tp: int
) -> None:
    check_two_syncs(world, models, tmp_path / "weights", name, tp, pp, engine_tp)


@pytest.mark.long  # SGLang is imported in three or four processes
@sglang_here
@pytest.mark.parametrize(
    ("name", "tp", "pp", "engine_tp"),
    [
        pytest.param("qwen3-tied", 2, 1, 1, id="qwen3-tied-TP2-to-2xtp1"),
        pytest.param("qwen3", 2, 1, 2, id="qwen3-TP2-to-tp2"),
        pytest.param("qwen2", 1, 2, 2, id="qwen2-PP2-to-tp2"),
        pytest.param("llama", 1, 2, 2, id="llama-PP2-to-tp2"),
    ],
)
def test_sglang_receives_the_policys_weights_and_all_its_ranks_return_the_same(
    world: EngineRanks, models: Models, tmp_path: Path, name: str, tp: int, pp: int, engine_tp: int
) -> None:
    check_two_syncs(world, models, tmp_path / "weights", name, tp, pp, engine_tp, "sglang")
    assert world.call(supports_slices) == [True, True]
    first, second = world.call(sampled)
    assert (first == second) == (engine_tp == 2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "name"),
    [("vllm", name) for name in SCALED]
    # latent attention is not supported with SGLang
    + [pytest.param("sglang", name, marks=sglang_here) for name in SCALED if name != "latent-yarn"],
)
def test_engines_scale_rotary_positions_as_the_policy_does(
    world: EngineRanks, models: Models, tmp_path: Path, name: str, kind: str
) -> None:
    world.open(models.engine[name], tp=1, kind=kind, **SETTINGS)
    axes = {"ep": 2} if name == "latent-yarn" else {"tp": 2}
    world.call(build, Path(shutil.copytree(models.policy[name], tmp_path / "weights")), axes, {})
    world.call(push, 0)
    assert world.call(largest_mismatch)[0] <= 1e-4


@pytest.mark.long  # each server imports vLLM
@pytest.mark.parametrize(("name", "servers", "tp"), [("qwen3", 2, 1), ("qwen3-tied", 1, 2)])
def test_servers_receive_the_policys_weights(
    world: EngineRanks, models: Models, tmp_path: Path, name: str, servers: int, tp: int
) -> None:
    folder = models.engine[name]
    config = write_config(tmp_path / "config.yaml", folder, max_model_len=96, max_num_seqs=48, tp=tp)
    with ExitStack() as stack:
        started = [stack.enter_context(serving([str(config)], tmp_path / f"server_{i}")) for i in range(servers)]
        urls = tuple(server.url for server in started)
        world.open(folder, tp=tp, kind="server", urls=urls, config=config)
        weights, engine = tmp_path / "weights", {"tp": tp, "placement": "server", "urls": urls}
        world.call(build, Path(shutil.copytree(models.policy[name], weights)), {"tp": 2}, engine)
        first = world.call(push, 0)
        assert world.call(largest_mismatch)[0] <= 1e-4
        world.call(perturb, 1)
        assert world.call(largest_mismatch)[0] > 1e-2
        second = world.call(push, 1)
        assert world.call(largest_mismatch)[0] <= 1e-4
        digests = expected_digest(models.policy[name]), expected_digest(models.policy[name], 1)
        assert [{r.policy_digest for r in reports} for reports in (first, second)] == [{each} for each in digests]
        answers = world.call(sampled)
        assert (answers[0] == answers[1]) == (servers == 1)
        world.close()


def make_stored_head(folder: Path, family: Any, head: Any) -> Path:
    """Make a model whose config.json ties the head that its files hold nevertheless."""
    if family == "qwen3_moe":
        tied = raw_family_config(family, mlp_only_layers=[], tie_word_embeddings=True)
        return store_head(make_family_model(folder, tied), head)
    return store_head(make_tiny_model(folder, family, tie=True, vocab=70), head)


def stored_head_cases(kind: str) -> list[Any]:
    """Return (kind, family, head, policy's axes, engine_tp); two cases with vLLM are in the short tier."""
    short = [("qwen3", "copy", {"tp": 2}, 1), ("qwen3", "different", {"pp": 2}, 2)]
    layouts: dict[str, Any] = {"llama": ({"pp": 2}, 2), "qwen2": ({"tp": 2}, 1), "qwen3_moe": ({"ep": 2}, 1)}
    others = [(family, head, *layout) for family, layout in layouts.items() for head in ("copy", "different")]
    marks = [pytest.mark.long, *([sglang_here] if kind == "sglang" else [])]
    return [
        pytest.param(kind, *case, marks=marks if kind == "sglang" or case in others else (),
                     id=f"{kind}-{case[0]}-{case[1]}")
        for case in (*short, *others)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "family", "head", "axes", "engine_tp"), [*stored_head_cases("vllm"), *stored_head_cases("sglang")]
)
def test_a_head_that_the_files_of_a_tied_model_hold_is_synchronized_as_transformers_reads_it(
    world: EngineRanks, tmp_path: Path, kind: str, family: str, head: str, axes: dict[str, int], engine_tp: int
) -> None:
    """Transformers ties a copy and unties another head; vLLM would untie both and leave the copy unfilled."""
    folder = make_stored_head(tmp_path / "model", family, head)
    world.open(folder, tp=engine_tp, kind=kind, **SETTINGS)
    world.call(build, Path(shutil.copytree(folder, tmp_path / "weights")), axes, {"tp": engine_tp})
    world.call(push, 0)
    assert world.call(largest_mismatch)[0] <= 1e-4
    assert largest_log_prob_error(folder, PROMPTS, world.call(sampled)[0], 1.0) <= 2e-5
    world.call(perturb, 1)
    assert world.call(largest_mismatch)[0] > 1e-2
    second = world.call(push, 1)
    assert world.call(largest_mismatch)[0] <= 1e-4
    if head == "different":
        assert {report.policy_digest for report in second} == {expected_digest(folder, 1)}


def supports_slices(session: RankSession) -> bool:
    supported: bool = session.engine.sink.supports_slices
    return supported


def sampled(session: RankSession) -> list[list[Completion]]:
    """Sample with the seed of the replica; all ranks of a replica return the same."""
    seed = session.kept["policy"].ranks.at.replica
    groups: list[list[Completion]] = session.engine.generate(PROMPTS, SamplingRequest(4, 1.0, 8, seed=seed))
    return groups


@pytest.mark.parametrize(
    ("name", "engine_tp", "engine_ep"),
    [
        pytest.param("qwen3_moe", 1, 1, id="EP2-to-2xtp1"),
        pytest.param("qwen3_moe", 2, 2, id="EP2-to-tp2ep2"),
        pytest.param("deepseek_v3", 2, 2, id="latent-EP2-to-tp2ep2"),
        pytest.param("deepseek_v3", 1, 1, id="latent-EP2-to-2xtp1", marks=pytest.mark.long),
        pytest.param("deepseek_v2", 2, 2, id="latent-v2-EP2-to-tp2ep2", marks=pytest.mark.long),
        pytest.param("mixtral", 2, 2, id="mixtral-EP2-to-tp2ep2", marks=pytest.mark.long),
        pytest.param("glm4_moe", 2, 2, id="glm-EP2-to-tp2ep2", marks=pytest.mark.long),
        pytest.param("gpt_oss", 2, 1, id="sinks-EP2-to-tp2"),  # one rank of the engine adds the biases of experts
        pytest.param("gpt_oss", 2, 2, id="sinks-EP2-to-tp2ep2", marks=pytest.mark.long),
        pytest.param("gpt_oss", 1, 1, id="sinks-EP2-to-2xtp1", marks=pytest.mark.long),
    ],
)
def test_engines_with_experts_receive_weights_of_an_expert_parallel_policy(
    world: EngineRanks, models: Models, tmp_path: Path, name: str, engine_tp: int, engine_ep: int
) -> None:
    """Packed experts are read from their packed positions, latent attention from `kv_b_proj`."""
    world.open(models.engine[name], tp=engine_tp, ep=engine_ep, **SETTINGS)
    weights = Path(shutil.copytree(models.policy[name], tmp_path / "weights"))
    world.call(build, weights, {"ep": 2}, {"tp": engine_tp})
    assert "permuted" in world.call(kinds)[0]
    for version in (0, 1):
        reports = world.call(push, version)
        assert world.call(largest_mismatch)[0] <= 1e-4
        world.call(perturb, version)
        assert world.call(largest_mismatch)[0] > 1e-3
        assert len({report.policy_digest for report in reports}) == 1


@pytest.mark.long
@sglang_here
@pytest.mark.parametrize(
    ("name", "engine_tp"), [("sglang_moe", 1), ("sglang_moe", 2), ("sglang_mixtral", 2), ("glm4_moe", 2)]
)
def test_sglang_with_experts_receives_weights_of_an_expert_parallel_policy(
    world: EngineRanks, models: Models, tmp_path: Path, name: str, engine_tp: int
) -> None:
    """SGLang builds every layer of Qwen3-MoE with experts, and Mixtral with heads of hidden_size / num_heads."""
    world.open(models.engine[name], tp=engine_tp, kind="sglang", **SETTINGS)
    assert world.call(supports_slices) == [True, True]
    weights = Path(shutil.copytree(models.policy[name], tmp_path / "weights"))
    world.call(build, weights, {"ep": 2}, {"tp": engine_tp})
    for version in (0, 1):
        world.call(push, version)
        assert world.call(largest_mismatch)[0] <= 1e-4
        world.call(perturb, version)
        assert world.call(largest_mismatch)[0] > 1e-3


@pytest.mark.long
@sglang_here
@pytest.mark.parametrize("name", ["sglang_moe", "glm4_moe"])
def test_expert_parallel_sglang_holds_the_policys_weights(
    world: EngineRanks, models: Models, tmp_path: Path, name: str
) -> None:
    """Without CUDA an expert-parallel SGLang 0.5.23 holds weights but cannot compute (fused_moe_native.py)."""
    world.open(models.engine[name], tp=2, ep=2, kind="sglang", **SETTINGS)
    assert world.call(supports_slices) == [True, True]
    world.call(build, Path(shutil.copytree(models.policy[name], tmp_path / "weights")), {"tp": 2}, {"tp": 2})
    assert world.call(experts_held) == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    for version in (0, 1):
        reports = world.call(push, version)
        digests = {report.policy_digest for report in reports}
        assert digests == {expected_digest(models.policy[name], *range(version))}
        world.call(perturb, version)


def experts_held(session: RankSession) -> set[int]:
    """Return the experts that this rank of the engine holds; each must be whole."""
    held = set()
    for region in session.engine.sink.layout():
        hf = region.placement.hf
        if ".experts." in hf.name:
            assert hf.offsets == (0, 0)
            assert set(hf.shape) == {32, 64}
            held.add(int(hf.name.partition(".experts.")[2].partition(".")[0]))
    return held


def kinds(session: RankSession) -> set[str]:
    return {region.kind for region in session.engine.sink.layout()}


# Faults: each is a sink with one defect, on one rank.


class FaultySink:
    """The engine's own sink with one defect."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sink, name)

    def write(self, hf: TensorSlice, values: Tensor) -> None:
        self._sink.write(hf, values)

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        """Return the memory, unless the defect is in `write`."""
        return self._sink.memory_of(hf) if type(self).write is FaultySink.write else None

    def end_update(self, policy_version: int) -> None:
        self._sink.end_update(policy_version)


class FlippedBit(FaultySink):
    def end_update(self, policy_version: int) -> None:
        super().end_update(policy_version)
        parameter = dict(self._sink._model.named_parameters())["model.layers.1.mlp.down_proj.weight"]
        parameter.data.view(torch.int32)[7, 5] ^= 1


class SkippedWrite(FaultySink):
    def write(self, hf: TensorSlice, values: Tensor) -> None:
        if hf.name != "model.layers.0.input_layernorm.weight":
            super().write(hf, values)


class SwappedSlices(FaultySink):
    """Writes keys as values and values as keys: the same bytes in other places."""

    def write(self, hf: TensorSlice, values: Tensor) -> None:
        key, value = "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"
        name = {key: value, value: key}.get(hf.name, hf.name)
        super().write(TensorSlice(name, hf.offsets, hf.shape), values)


class StaleHead(FaultySink):
    def end_update(self, policy_version: int) -> None:
        with mock.patch.object(self._sink._regions, "rebuild"):
            super().end_update(policy_version)


class LostUpdate(FaultySink):
    def write(self, hf: TensorSlice, values: Tensor) -> None:
        pass


def push_with_fault(session: RankSession, fault: type[FaultySink], at: int, verify: bool) -> str | None:
    """Push inside the phases of a job and return the message of the mismatch on this rank."""
    sink = session.engine.sink
    chosen = fault(sink) if session.rank == at else sink
    sync = connect(session, chosen)
    phases = Phases(session.kept["policy"])
    phases.start_engine(lambda: session.engine)
    message = None
    try:
        with phases.syncing():
            sync.push(2, verify=verify)
    except WeightMismatchError as error:
        message = str(error)
    if message is not None:
        with pytest.raises(RuntimeError, match="a weight sync must run before sampling"), phases.sampling():
            pytest.fail("a token can be sampled from weights that failed verification")
    session.engine.wake("kv_cache")
    return message


FAULTS = [
    (FlippedBit, ["model.layers.1.mlp.down_proj.weight[0:42, 48:96] on rank 1"]),  # the piece that was transferred
    (SkippedWrite, ["model.layers.0.input_layernorm.weight[0:64] on rank 1"]),
    (
        SwappedSlices,
        [f"model.layers.1.self_attn.{x}_proj.weight[32:64, 0:64] on rank 1" for x in "kv"],
    ),
    (StaleHead, ["lm_head.weight[64:70, 0:64] on rank 1", "6 of 64 rows differ from the plain weight"]),
]


@pytest.fixture
def pair(world: EngineRanks, models: Models, tmp_path: Path) -> EngineRanks:
    """A TP2 policy and a tp2 engine after a sync; then the policy's weights change."""
    start(world, models, tmp_path / "weights", "qwen3", 2, 1, 2)
    world.call(push, 0)
    world.call(perturb, 1)
    return world


@pytest.mark.parametrize(("fault", "expected"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_fault_on_one_rank_stops_all_ranks_and_names_tensor_rank_and_slice(
    pair: EngineRanks, fault: type[FaultySink], expected: list[str]
) -> None:
    messages = pair.call(push_with_fault, fault, 1, True)
    assert messages[0] is not None
    assert messages[0] == messages[1]
    for words in expected:
        assert words in messages[0]
    others = messages[0].count(" on rank ") - sum(" on rank " in words for words in expected)
    assert others == 0, f"the message names more than the fault: {messages[0]}"


def test_without_verification_the_same_fault_is_not_detected_and_the_engine_samples_from_other_weights(
    pair: EngineRanks,
) -> None:
    assert pair.call(push_with_fault, SkippedWrite, 1, False) == [None, None]
    assert pair.call(largest_mismatch)[0] > 1e-3
    assert all(message is not None for message in pair.call(push_with_fault, SkippedWrite, 1, True))


def change_after_push(session: RankSession, verify: bool, at: int | None) -> str | None:
    """Push, change one number of the engine of rank `at`, and return the message of the comparison after sampling."""
    sync, phases = connect(session, session.engine.sink), Phases(session.kept["policy"])
    phases.start_engine(lambda: session.engine)
    with phases.syncing():
        sync.push(2, verify=verify)
    message = None
    with phases.sampling():
        if session.rank == at:
            sink = session.engine.sink
            region = next(r for r in sink.layout() if r.placement.hf.name == "model.layers.1.input_layernorm.weight")
            memory = sink._regions.memory_of(region, region.placement.hf)
            assert memory is not None
            memory[0] += 2**-10
        try:
            sync.verify_after_sampling()
        except WeightMismatchError as error:
            message = str(error)
    with phases.reading_weights():  # for the next call
        return message


def test_weights_that_change_after_the_verification_stop_all_ranks(pair: EngineRanks) -> None:
    """A change that is far too small for the guard on log-probs."""
    messages = pair.call(change_after_push, True, 1)
    assert messages[0] is not None
    assert messages[0] == messages[1]
    assert "model.layers.1.input_layernorm.weight: the weights of version 2" in messages[0]
    assert "(1 in all)" in messages[0]
    assert pair.call(change_after_push, True, None) == [None, None]
    assert pair.call(change_after_push, False, 1) == [None, None], "nothing was verified (weight_sync.verify)"


def test_an_update_that_one_of_two_replicas_loses_names_only_that_replica(
    world: EngineRanks, models: Models, tmp_path: Path
) -> None:
    check_two_syncs(world, models, tmp_path / "weights", "qwen3", 1, 1, 1)
    world.call(perturb, 2)
    messages = world.call(push_with_fault, LostUpdate, 1, True)
    assert messages[0] is not None
    assert messages[0] == messages[1]
    assert "model.embed_tokens.weight[0:32, 0:64] on rank 1" in messages[0]
    assert "on rank 0" not in messages[0]
    assert "(59 in all)" in messages[0]  # every piece of every tensor of the model


def untied_parameters(session: RankSession, folder: Path) -> str:
    """Start vLLM with the choice that it makes by itself, and return the error."""
    from grpo_mega.engines.vllm import lifecycle
    from grpo_mega.engines.vllm.arguments import VllmSettings
    from grpo_mega.engines.vllm.engine import VllmEngine

    if session.engine is not None:
        session.engine.close()
        session.engine, session.opened = None, None
    settings = VllmSettings(folder, "fp32", tp=1, seed=0, **SETTINGS)
    with mock.patch.object(lifecycle, "tied_as_configured", ExitStack), pytest.raises(RuntimeError) as raised:
        VllmEngine(settings)
    return str(raised.value)


def test_a_parameter_that_no_tensor_of_the_sync_fills_stops_the_start(world: EngineRanks, tmp_path: Path) -> None:
    """The last test before it has an engine with the same tensor parallelism, whose process groups may remain."""
    folder = make_stored_head(tmp_path / "model", "qwen3", "copy")
    try:
        messages = world.call(untied_parameters, folder)
    finally:
        world.close()  # vLLM's process groups of a start that failed remain
    assert all("no tensor of the checkpoint fills lm_head.weight [128, 64]" in message for message in messages)
