"""Functions for ranks with a Megatron policy and an engine (engine_ranks.py): build, sync, perturb, compare."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.config.schema import Config
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.interfaces import WeightSink
from grpo_mega.models.digest import combined_digest, slice_digest
from grpo_mega.parallel.ranks import init_ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import Completion, Prompt, Reward, Rollout, SamplingRequest, TensorSlice
from grpo_mega.weight_sync.sync import SyncReport, SyncSettings, WeightSync
from tests.helpers.engine_ranks import RankSession
from tests.helpers.packing import pack, unpack

BUCKET_BYTES = 64 * 1024  # several buckets, even for tiny models


def prepare_policy(session: RankSession) -> None:
    """Import the policy before the engine, as a job does: the import prepares Megatron for machines without CUDA."""
    import grpo_mega.policy.policy  # noqa: F401

    os.environ.update(RANK=str(session.rank), WORLD_SIZE=str(dist.get_world_size()))


def build(session: RankSession, weights: Path, axes: dict[str, Any], engine: dict[str, Any]) -> None:
    """Build the policy with the weights of a folder, which is then deleted, and its connection to the open engine.

    `axes` are the keys of the config's `parallel`, `engine` those of its `engine`.
    """
    from grpo_mega.policy.policy import MegatronPolicy

    config = Config.model_validate(
        {
            "model": {"path": str(weights)},
            "parallel": axes,
            "engine": engine,
            "data": {"train": "arithmetic:train"},
            "reward": {"terms": [{"name": "exact"}]},
            "train": {"steps": 1},
            "precision": {"dtype": "fp32"},
        }
    )
    topology = Topology.of(config, dist.get_world_size())
    ranks = init_ranks(topology, 60.0)
    policy = MegatronPolicy(config, checkpoint_spec(weights), weights, ranks, with_reference=False)
    groups = [dist.new_group(topology.replica_ranks(i)) for i in range(topology.num_replicas)]
    session.kept.update(policy=policy, groups=groups)
    dist.barrier()
    if session.rank == 0:
        shutil.rmtree(weights)
    dist.barrier()


def connect(session: RankSession, sink: WeightSink) -> WeightSync:
    """Return a weight sync from the policy to this sink, which is the engine's own or forwards to it."""
    policy, engine = session.kept["policy"], session.engine
    topology = policy.ranks.topology
    replicas, more = [topology.replica_ranks(i) for i in range(topology.num_replicas)], dict[str, Any]()
    if topology.engine_servers:
        where = topology.describe(session.rank)
        peers = engine.sync_peers(policy.source.hf_shapes(), where, bucket_bytes=BUCKET_BYTES, transport="auto")
        replicas, more = peers.replicas, {"world": peers.group, "announce": peers.announce}
    return WeightSync(
        policy.source,
        policy.full_tensors,
        sink,
        source_group=policy.model_parallel_group,
        replicas=replicas,
        replica_group=session.kept["groups"][policy.ranks.at.replica],
        settings=SyncSettings(BUCKET_BYTES, 60.0),
        where=topology.describe(session.rank),
        **more,
    )


def push(session: RankSession, version: int) -> SyncReport:
    """Plan and run a verified sync of the policy's current weights."""
    return connect(session, session.engine.sink).push(version, verify=True)


def noise_of(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Return what `perturb` adds to a whole Hugging Face tensor."""
    digest = hashlib.sha256(f"{name} {seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return 0.03 * torch.randn(tuple(shape), generator=generator)


def perturb(session: RankSession, seed: int) -> None:
    """Change the weights to the same new model on all ranks: each piece of a parameter gets its part of the noise."""
    weights = session.kept["policy"].weights
    with torch.no_grad():
        for name, parameter in weights._parameters.items():
            for placement in weights._placements(name):
                hf = placement.hf
                parameter[placement.local.index] += noise_of(hf.name, weights.hf_shapes()[hf.name], seed)[hf.index]


def sample(
    session: RankSession,
    shards: Sequence[Sequence[Prompt]],
    sampling: SamplingRequest,
    limits: Sequence[tuple[int, ...]],
) -> list[Rollout]:
    """Sample this rank's prompt shard with the seed of the shard; `limits` are the token limits of its prompts."""
    shard = session.kept["policy"].ranks.at.prompt_shard
    request = replace(sampling, seed=sampling.seed + shard, max_tokens_each=limits[shard])
    groups: list[list[Completion]] = session.engine.generate(shards[shard], request)
    rollouts = [Rollout(p, c, Reward(0.0), shard) for p, g in zip(shards[shard], groups, strict=True) for c in g]
    session.kept["rollouts"] = rollouts
    return rollouts


def largest_mismatch(session: RankSession) -> float:
    """Return the largest difference of log-probs between policy and engine over the rollouts of `sample`."""
    policy = session.kept["policy"]
    return largest_difference(policy, session.kept["rollouts"] if policy.ranks.at.engine_tp_rank == 0 else [])


def largest_difference(policy: Any, mine: Sequence[Rollout]) -> float:
    """Return the largest difference of log-probs between policy and engine over all ranks' rollouts. Collective."""
    world = dist.get_world_size()
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, list(mine))
    rollouts = [rollout for part in gathered for rollout in part]
    ones = [1.0] * len(rollouts)
    row_tokens = -(-sum(r.num_tokens for r in rollouts) // 8) * 8  # sequence parallelism splits rows over tp ranks
    row = pack(list(enumerate(rollouts)), row_tokens=row_tokens, advantages=ones, token_weights=ones, pad_id=0)
    worst = 0.0
    outputs = policy.log_probs([row])
    if outputs is not None:
        olds = unpack(outputs[0], row)
        worst = max(
            abs(old - sampled)
            for i, rollout in enumerate(rollouts)
            for old, sampled in zip(olds[i], rollout.completion.sampler_log_probs, strict=True)
        )
    all_ranks: list[Any] = [None] * world
    dist.all_gather_object(all_ranks, worst)
    return max(all_ranks)


def expected_digest(weights: Path, *seeds: int) -> str:
    """Return the digest of the files plus the noise, without the policy."""
    from safetensors.torch import load_file

    digests = {}
    for name, tensor in load_file(weights / "model.safetensors").items():
        for seed in seeds:
            tensor = tensor + noise_of(name, tensor.shape, seed)
        digests[name] = slice_digest(tensor, TensorSlice(name, (0,) * tensor.dim(), tuple(tensor.shape)))
    return combined_digest(digests)
