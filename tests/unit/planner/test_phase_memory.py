"""The planner's arithmetic, by hand: schedules, buffers, engine weights, phases."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_mega.models.engine_memory import engine_weight_bytes
from grpo_mega.parallel.topology import Topology
from grpo_mega.planner.hardware import Assumptions, Cluster, gpu_named
from grpo_mega.planner.phase_memory import PHASES, _more_than
from grpo_mega.planner.pipeline_schedule import peak_of_schedule
from grpo_mega.planner.static_memory import ModelChunk, static_bytes
from grpo_mega.types import UserError
from tests.helpers.planner_cases import SIZES, config_of, inputs_of, memory_of, spec_of


def test_1f1b_holds_one_microbatch_per_remaining_stage() -> None:
    held = [peak_of_schedule([1.0], 4, rank, 8)[0] for rank in range(4)]
    assert held == [4, 3, 2, 1]


def test_a_pipeline_holds_no_more_microbatches_than_there_are() -> None:
    assert peak_of_schedule([1.0], 4, 0, 2)[0] == 2


def test_an_interleaved_pipeline_holds_chunks_as_megatron_runs_ahead() -> None:
    # rank 0 of 2, 2 chunks: 2 (2 - 0 - 1) + (2 - 1) 2 = 4 passes ahead, and the one of the steady state
    peak, alive = peak_of_schedule([1.0, 10.0], 2, 0, 4)
    assert alive == [3, 2]
    assert peak == 23


def test_buffers_are_padded_as_megatron_pads_them() -> None:
    # starts at multiples of 64: norm at 0, matrix at 64, end 264; of 4 ranks and 128: 384
    chunk = ModelChunk((False,), has_embedding=False, has_head=False)
    found = static_bytes([chunk], SIZES, inputs_of(world=4))
    assert (found.parameters, found.weights, found.gradients) == (210, 2 * 384, 4 * 384)
    assert found.optimizer == 12 * 384 // 4


def test_fp32_weights_need_no_master_weights() -> None:
    chunk = ModelChunk((False,), has_embedding=False, has_head=False)
    found = static_bytes([chunk], SIZES, inputs_of(config_of(precision={"dtype": "fp32"})))
    assert (found.weights, found.optimizer) == (4 * 384, 8 * 384)


def test_expert_optimizer_state_is_sharded_over_expert_replicas() -> None:
    chunk = ModelChunk((True,), has_embedding=False, has_head=False)
    # experts: 300 -> 384 elements over edp = 4 / 4 = 1 rank; router: 10 -> 128 over dp = 4
    found = static_bytes([chunk], SIZES, inputs_of(config_of(parallel={"ep": 4}), world=4))
    assert found.optimizer == 12 * (384 + 128 // 4)


def test_a_tied_head_is_a_copy_only_on_another_stage() -> None:
    first = ModelChunk((), has_embedding=True, has_head=False)
    last = ModelChunk((), has_embedding=False, has_head=True)
    both = ModelChunk((), has_embedding=True, has_head=True)
    spec = spec_of(tie_word_embeddings=True)
    numels = [static_bytes([c], SIZES, inputs_of(spec=spec)).parameters for c in (first, last, both)]
    assert numels == [100, 110, 110]


def test_the_host_stores_its_fraction_of_the_optimizer() -> None:
    chunk = ModelChunk((False,), has_embedding=False, has_head=False)
    found = static_bytes([chunk], SIZES, inputs_of(config_of(optimizer={"host_fraction": 0.75})))
    assert (found.optimizer, found.optimizer_on_host) == (12 * 384 // 4, 12 * 384 * 3 // 4)


def test_moments_in_bf16_take_half_the_memory() -> None:
    chunk = ModelChunk((False,), has_embedding=False, has_head=False)
    found = static_bytes([chunk], SIZES, inputs_of(config_of(optimizer={"moments": "bf16"})))
    assert found.optimizer == (4 + 2 * 2) * 384


@pytest.mark.parametrize(("world", "state"), [(1, 8 * 640 + 4 * 384), (2, 8 * 320 + 4 * 218), (4, 12 * 160)])
def test_muon_has_one_moment_for_matrices_of_layers(world: int, state: int) -> None:
    """Embedding and head 100 -> 128 elements each, two norms 10 -> 64 each, matrix 200 -> 256: 640, of which Adam 384.

    The buffer is head, final norm, layer (64 of its 320 elements are Adam's), embedding. Of 2 ranks, the first holds
    head, norm and 128 elements of the layer: 128 + 64 + 128 * 64 / 320 = 217.6. Of 4 ranks, the first has Adam's alone.
    """
    chunk = ModelChunk((False,), has_embedding=True, has_head=True)
    found = static_bytes([chunk], SIZES, inputs_of(config_of(optimizer={"name": "muon"}), world=world))
    assert (found.optimizer, found.orthogonalization) == (state, 28 * 200)
    assert found.one_moment == 256


def test_the_memory_of_an_orthogonalization_counts_only_beyond_the_released_activations() -> None:
    plan = memory_of(config_of(optimizer={"name": "muon"}), spec_of(), 1)
    assert "orthogonalization" not in plan.ranks[0].phases["train"]
    adam = memory_of(config_of(), spec_of(), 1)
    assert plan.checkpoint < adam.checkpoint
    assert _more_than("orthogonalization", 10.0, 4.0) == {"orthogonalization": 6.0}


def test_an_engine_replicates_norms_and_key_heads_fewer_than_its_ranks() -> None:
    # vocab 21, hidden 64, ffn 96, 2 layers, 4 heads and 2 key heads of 16
    matrices = 2 * 21 * 64 + 2 * (2 * 64 * 64 + 3 * 64 * 96)
    keys, norms = 2 * 2 * 32 * 64, 5 * 64
    found = [engine_weight_bytes(spec_of(), Topology(4, engine_tp=tp), 2, spread=False) for tp in (1, 4)]
    assert found == [2 * (matrices + keys + norms), 2 * (matrices / 4 + keys / 2 + norms)]


def test_data_parallel_engine_ranks_share_the_experts() -> None:
    # Mixtral: 2 layers of 4 experts of 3 x 64 x 96, and a router of 4 x 64
    experts, attention = 2 * 4 * 3 * 64 * 96, 2 * 21 * 64 + 2 * 2 * 64 * 64
    keys, repeated = 2 * 2 * 32 * 64, 5 * 64 + 2 * 4 * 64
    spec, topology = spec_of("mixtral", num_local_experts=4), Topology(8, engine_tp=2, engine_dp=4)
    for spread in (True, False):
        found = engine_weight_bytes(spec, topology, 2, spread=spread)
        assert found == 2 * (experts / 8 + attention / 2 + keys / 2 + repeated)


def test_the_kv_cache_has_room_for_the_completions_of_an_evaluation() -> None:
    sizes = [
        memory_of(config_of(evaluation={"max_tokens": most}), spec_of(), 1, "cpu").engine.kv_cache
        for most in (None, 32, 192)
    ]
    assert sizes[0] == sizes[1]  # prompts of 64 tokens and completions of 64
    assert sizes[2] / sizes[0] == pytest.approx(2, rel=1e-3)


def test_servers_hold_the_engines_on_separate_devices() -> None:
    urls: dict[str, Any] = {"placement": "server", "urls": ("a:1", "a:2"), "tp": 2}
    beside = memory_of(config_of(engine={"tp": 2}), spec_of(), 4)
    elsewhere = memory_of(config_of(engine=urls), spec_of(), 4)
    (rank,), (other,) = elsewhere.ranks, beside.ranks
    assert set(rank.phases) - set(other.phases) == {"server"}
    assert {"engine weights", "KV cache", "engine workspace", "sync buckets"} <= set(rank.phases["server"])
    assert elsewhere.engine.weights == beside.engine.weights
    for phase, items in rank.phases.items():
        if phase != "server":
            assert not {"engine weights", "KV cache", "engine asleep", "policy offloaded"} & set(items)
            assert {"weights", "gradients", "optimizer"} <= set(items)  # which always stay on the device
    assert elsewhere.host["offloaded optimizer"] == 0 < beside.host["offloaded optimizer"]


def test_each_phase_holds_the_items_of_its_table() -> None:
    (rank,) = memory_of(config_of(), spec_of(), 1).ranks
    held = {phase: set(rank.phases[phase]) for phase in PHASES}
    assert {"weights", "gradients", "optimizer", "activations"} <= held["train"]
    assert "engine weights" not in held["train"] | held["log_probs"]
    assert {"engine weights", "KV cache"} <= held["rollout"]
    assert not {"weights", "gradients", "optimizer"} & held["rollout"]
    assert {"weights", "engine weights", "sync buckets"} <= held["sync"]
    assert not {"gradients", "optimizer", "KV cache"} & held["sync"]
    bucket_bytes = config_of().weight_sync.bucket_bytes
    assert rank.phases["sync"]["sync buckets"] == 2 * bucket_bytes, (
        "tensors are sent in pieces, with two buckets in memory"
    )


def test_a_critic_has_its_own_phase_and_doubles_the_host_memory() -> None:
    plain, ppo = (memory_of(config_of(algorithm={"name": name}), spec_of(), 1) for name in ("grpo", "ppo"))
    assert "value" not in plain.phases
    assert {"weights", "gradients", "optimizer", "activations"} <= set(ppo.ranks[0].phases["value"])
    assert "logits" not in ppo.ranks[0].phases["value"]
    assert ppo.host["offloaded optimizer"] == 2 * plain.host["offloaded optimizer"] > 0


def test_a_reference_uses_host_memory_only_if_the_loss_needs_it() -> None:
    with_kl = memory_of(config_of(), spec_of(), 1).host["reference"]
    without = memory_of(config_of(algorithm={"kl_coef": 0.0}), spec_of(), 1).host["reference"]
    assert with_kl > without == 0


def test_a_synchronous_save_copies_one_state_of_the_largest_parameter_on_each_rank_of_a_node() -> None:
    # the matrix of a layer has 10 x 20 elements, the embedding and the head 10 x 10; 8 ranks per node
    for world, ranks_per_node in ((1, 1), (4, 4), (16, 8)):
        plan = memory_of(config_of(data={"prompts_per_step": 16}), spec_of(), world)
        assert plan.host["checkpoint"] == ranks_per_node * 4 * 200
    # a state on the host is copied, too, where it is a part of a larger tensor
    on_host = memory_of(config_of(optimizer={"host_fraction": 1.0}, parallel={"pp": 2}), spec_of(), 2)
    assert on_host.host["checkpoint"] == 2 * 4 * 200


@pytest.mark.parametrize(("dtype", "weight", "masters"), [("bf16", 2, 12), ("fp32", 4, 8)])
def test_an_asynchronous_save_copies_all_that_the_ranks_of_a_node_save(dtype: str, weight: int, masters: int) -> None:
    precision = {"precision": {"dtype": dtype}, "checkpoint": {"asynchronous": True}}
    for changes in ({}, {"optimizer": {"host_fraction": 1.0}}):
        plan = memory_of(config_of(**precision, **changes), spec_of(), 4)
        static = plan.ranks[0].static
        elements = (static.optimizer + static.optimizer_on_host) / masters
        assert plan.host["checkpoint"] == 4 * elements * (weight + 12)
    critic = memory_of(config_of(algorithm={"name": "ppo"}, **precision), spec_of(), 4)
    assert critic.host["checkpoint"] == 2 * plan.host["checkpoint"]
    moving = memory_of(config_of(algorithm={"ref_update_every": 1}, **precision), spec_of(), 4)
    assert moving.host["checkpoint"] == plan.host["checkpoint"] + 4 * elements * weight


def test_without_cuda_policy_and_critic_leave_the_device_as_on_cuda() -> None:
    plan = memory_of(config_of(algorithm={"name": "ppo"}), spec_of(), 1, gpu="cpu")
    (rank,) = plan.ranks
    state = rank.static.weights + rank.static.gradients + rank.static.optimizer
    for phase, items in rank.phases.items():
        held = sum(items.get(name, 0) for name in ("weights", "gradients", "optimizer"))
        assert held == {"rollout": 0, "sync": rank.static.weights}.get(phase, state), phase
    assert plan.host["offloaded optimizer"] > 0


def test_recomputation_stores_less_and_sequence_parallelism_splits_it() -> None:
    spec = spec_of(num_hidden_layers=4)
    plain, selective, full = (
        memory_of(config_of(parallel={"recompute": how}), spec, 1, "cpu").ranks[0].activations
        for how in ("none", "selective", "full")
    )
    assert full < selective < plain
    fused = [
        memory_of(config_of(parallel={"recompute": how}), spec, 1).ranks[0].activations for how in ("none", "selective")
    ]
    assert fused[0] == fused[1], "a fused kernel recomputes its scores itself"
    tp, cut = (
        memory_of(config_of(parallel={"tp": 2, "sequence_parallel": sp}), spec, 2).ranks[0].activations
        for sp in (False, True)
    )
    assert cut < tp < fused[0]


def test_the_workload_counts_microbatches_of_full_length() -> None:
    # 32 rollouts of 128 tokens, 2 a row, on 2 ranks: 8; under vpp a multiple of pp
    assert inputs_of(world=2).workload.num_microbatches == 8
    interleaved = config_of(parallel={"pp": 3, "vpp": 2})
    assert inputs_of(interleaved, spec_of(num_hidden_layers=6), 6).workload.num_microbatches == 9


def test_an_unknown_device_is_rejected_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"--gpu=h101 .*; use one of .*h100-80g"):
        gpu_named("h101")


def test_links_between_nodes_have_the_speed_of_the_network() -> None:
    cluster = Cluster(gpu_named("h100-80g"), 16, Assumptions(link=1.0))
    assert (cluster.link_speed(8), cluster.link_speed(16)) == (450e9, 50e9)
