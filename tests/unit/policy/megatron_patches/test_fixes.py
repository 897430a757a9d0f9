"""Patches of Megatron's arithmetic, tested without ranks against formulas from which unpatched Megatron differs."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from torch import Tensor

from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.policy import build
from grpo_mega.policy.megatron_patches import fixes
from grpo_mega.policy.weight_source import weight_copies
from tests.helpers.family_configs import raw_family_config
from tests.helpers.unpatched_megatron import unpatched

from megatron.core.optimizer import distrib_optimizer  # isort: skip - after megatron_patches, which prepares the import
from megatron.core.tensor_parallel.layers import ColumnParallelLinear  # isort: skip
from megatron.core.transformer.identity_op import IdentityOp  # isort: skip
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver  # isort: skip
from megatron.core.transformer.moe import moe_utils  # isort: skip


def best_of_groups(scores: list[float], size: int, best: int, group_topk: int, topk: int) -> list[int]:
    """Return the experts of one token: the best groups by the sum of their `best` scores, then their best experts."""
    groups = [scores[i : i + size] for i in range(0, len(scores), size)]
    order = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-best:]))[:group_topk]
    among = [g * size + i for g in order for i in range(size)]
    return sorted(sorted(among, key=lambda e: -scores[e])[:topk])


@pytest.mark.parametrize(("family", "best"), [("deepseek_v2", 1), ("deepseek_v3", 2), ("glm4_moe", 2)])
@pytest.mark.parametrize("topk", [2, 3, 4])
def test_expert_groups_are_scored_by_the_rule_of_the_family_for_every_topk(family: str, best: int, topk: int) -> None:
    fixes.fit_to(spec_from_config(raw_family_config(family), "config.json"))
    scores: Tensor = torch.rand(200, 16, generator=torch.Generator().manual_seed(0))
    values, experts = moe_utils.group_limited_topk(scores, topk, 200, 16, 4, 2)
    for token in range(200):
        assert sorted(experts[token].tolist()) == best_of_groups(scores[token].tolist(), 4, best, 2, topk)
    assert torch.equal(values, scores.gather(1, experts))


@pytest.mark.parametrize(("best", "topk"), [(1, 4), (2, 2)])
def test_megatron_scores_groups_by_another_rule_without_the_patch(best: int, topk: int) -> None:
    scores: Tensor = torch.rand(200, 16, generator=torch.Generator().manual_seed(0))
    _, experts = unpatched("transformer.moe.moe_utils").group_limited_topk(scores, topk, 200, 16, 4, 2)
    expected = [best_of_groups(row.tolist(), 4, best, 2, topk) for row in scores]
    assert [sorted(row.tolist()) for row in experts] != expected


def latent_attention() -> tuple[Any, Any]:
    """Return config and submodules of latent attention without a compressed query, as DeepSeek-V2-Lite has it."""
    config = SimpleNamespace(
        q_lora_rank=None, experimental_attention_variant=None, transformer_impl="local", normalization="RMSNorm",
        qk_l2_norm=False, qk_layernorm=True,
    )  # fmt: skip
    submodules = SimpleNamespace(
        linear_q_proj=ColumnParallelLinear, linear_kv_up_proj=ColumnParallelLinear, linear_q_up_proj=None,
        q_layernorm=IdentityOp, kv_layernorm=torch.nn.RMSNorm,
    )  # fmt: skip
    return config, submodules


def test_an_uncompressed_query_of_latent_attention_has_no_norm() -> None:
    fixes.install()
    found = QKNormConfigResolver(*latent_attention()).resolve()
    assert (found["linear_q_proj"], found["q_layernorm"]) == (ColumnParallelLinear, IdentityOp)
    assert (found["linear_kv_up_proj"], found["kv_layernorm"]) == (ColumnParallelLinear, torch.nn.RMSNorm)


def test_megatron_requires_a_norm_of_the_uncompressed_query_without_the_patch() -> None:
    resolver = unpatched("transformer.mla_qk_norm_config").QKNormConfigResolver(*latent_attention())
    with pytest.raises(RuntimeError, match="linear_q_proj"):
        resolver.resolve()


def test_megatron_starts_a_process_for_the_results_of_a_save_without_the_patch() -> None:
    before = set(psutil.Process().children())
    stock = unpatched("dist_checkpointing.strategies.filesystem_async").get_write_results_queue("fork")
    started = set(psutil.Process().children()) - before
    del stock
    for process in started:
        process.kill()
    assert started


def test_the_optimizers_of_transformer_engine_need_no_placeholder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their steps are counted per group: a parameter's state has no `step`."""
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    weight = torch.nn.Parameter(torch.ones(3))
    fused: Any = SimpleNamespace(state={weight: {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}})
    with fixes.placeholder_steps(SimpleNamespace(optimizer=fused)):
        assert list(fused.state) == [weight]


def test_experts_are_separated_from_dense_layers() -> None:
    model = torch.nn.Module()
    model.decoder = torch.nn.Module()
    names = ("mlp.experts.local_experts.0.linear_fc1", "mlp.experts.gate_up", "mlp.shared_experts.linear_fc1")
    for name in names:
        holder: torch.nn.Module = model.decoder
        for part in ("layers", "0", *name.split(".")):
            if not hasattr(holder, part):
                holder.add_module(part, torch.nn.Module())
            holder = getattr(holder, part)
        holder.weight = torch.nn.Parameter(torch.zeros(1))
    fixes.separate_experts(model)
    apart = {name: not getattr(p, "allreduce", True) for name, p in model.named_parameters()}
    assert apart == {
        f"decoder.layers.0.{name}.weight": flag for name, flag in zip(names, (True, True, False), strict=True)
    }


@pytest.mark.parametrize(
    ("topology", "copies"),
    [
        (Topology(4, tp=2), [[0, 1], [2, 3]]),
        (Topology(4, tp=2, pp=2), [[0, 1, 2, 3]]),
        (Topology(4, ep=2), [[0, 1], [2, 3]]),
        (Topology(8, tp=2, ep=4), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (Topology(8, pp=2, etp=2), [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (Topology(12, tp=2, etp=3), [list(range(6)), list(range(6, 12))]),
    ],
    ids=str,
)
def test_a_copy_of_the_weights_is_on_the_fewest_adjacent_ranks(topology: Topology, copies: list[list[int]]) -> None:
    assert weight_copies(topology) == copies


def test_an_optimizer_without_parameters_has_the_step_of_the_others_in_a_checkpoint() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    trained, without = torch.optim.AdamW([weight]), torch.optim.AdamW([{"params": []}])
    weight.grad = torch.ones(3)
    trained.step()
    trained.step()
    chain: Any = SimpleNamespace(
        chained_optimizers=[SimpleNamespace(optimizer=trained), SimpleNamespace(optimizer=without)]
    )
    with fixes.placeholder_steps(chain):
        for adam in (trained, without):  # the check of distrib_optimizer.py:838
            assert {state["step"].item() for state in adam.state_dict()["state"].values()} == {2.0}
    assert without.state == {}
    assert list(trained.state) == [weight]


def test_three_warnings_of_megatron_are_not_logged_and_others_are(caplog: pytest.LogCaptureFixture) -> None:
    fixes.install()
    fixes.install()
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.warning("GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes")
    logger.warning("another warning")
    assert [record.getMessage() for record in caplog.records] == ["another warning"]
    for name, text in fixes._WARNINGS.items():  # the release still logs them from there
        source = importlib.util.find_spec(name)
        assert source is not None
        assert source.origin is not None
        assert text in Path(source.origin).read_text()


@pytest.mark.parametrize(("on_cuda", "backend"), [(True, "nccl"), (False, None)])
def test_groups_of_megatron_have_no_gloo_on_cuda(on_cuda: bool, backend: str | None) -> None:
    """Needed as long as `create_group` takes the backends of the default group, which has gloo."""
    from megatron.core import parallel_state

    backends: list[str | None] = []

    def new_group(**arguments: Any) -> None:
        backends.append(arguments["backend"])

    recorded = SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: 0, new_group=new_group)
    with (
        mock.patch.object(parallel_state, "torch", SimpleNamespace(distributed=recorded)),
        mock.patch.object(parallel_state, "_global_process_group_list", [None]),
        fixes.device_groups(torch.device("cuda", 0) if on_cuda else torch.device("cpu")),
    ):
        parallel_state.create_group([0], backend=None)
        parallel_state.create_group([0], timeout=None)
        parallel_state.create_group([0], backend="gloo")
    assert backends == [backend, backend, "gloo"]
    assert parallel_state.create_group.__name__ == "create_group"
    assert not hasattr(parallel_state.create_group, "__wrapped__")


@pytest.mark.parametrize(("device", "backend"), [("cuda", "nccl"), ("cpu", None)])
def test_the_policy_creates_its_groups_without_gloo_on_cuda(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str | None
) -> None:
    from megatron.core import parallel_state

    backends: list[str | None] = []
    topology = Topology(1)
    ranks = Ranks(topology, topology.coordinates(0), torch.device(device, 0))
    monkeypatch.setattr(parallel_state, "create_group", lambda ranks, backend=None: backends.append(backend))
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: False)
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", lambda *_, **__: parallel_state.create_group([0]))
    monkeypatch.setattr(build.tensor_parallel, "model_parallel_cuda_manual_seed", lambda seed: None)
    build.init_groups(ranks, 60.0)
    assert backends == [backend]
