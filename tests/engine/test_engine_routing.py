"""Expert choices of the real vLLM and SGLang, compared with the routers of a Megatron policy with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_mega.config.schema import Config
from grpo_mega.data.expert_records import widen_record
from grpo_mega.models.config_readers import read_spec
from grpo_mega.parallel.ranks import init_ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import Completion, Prompt, Reward, Rollout, SamplingRequest, UserError
from tests.helpers.engine_contract import sglang_here
from tests.helpers.engine_ranks import EngineRanks, RankSession, engine_ranks
from tests.helpers.family_configs import raw_family_config
from tests.helpers.packing import pack
from tests.helpers.tiny_models import make_family_model

NUM_LAYERS = 3


@dataclass(frozen=True)
class Case:
    """An engine and a model. SGLang has experts in every layer of a Qwen3-MoE."""

    kind: str
    family: str
    settings: dict[str, Any]
    expert_layers: list[int]
    """Layers that have experts."""


CASES = {
    "vllm-qwen3_moe": Case("vllm", "qwen3_moe", {"mlp_only_layers": [1]}, [0, 2]),
    "vllm-glm4_moe": Case("vllm", "glm4_moe", {}, [1, 2]),
    "sglang-qwen3_moe": Case("sglang", "qwen3_moe", {"mlp_only_layers": []}, [0, 1, 2]),
    "sglang-mixtral": Case("sglang", "mixtral", {}, [0, 1, 2]),
    "sglang-glm4_moe": Case("sglang", "glm4_moe", {}, [1, 2]),
}
# The records of both engines are read by the same code; vLLM's Qwen3-MoE is in the default tier.
LONG = ("vllm-glm4_moe", "sglang-qwen3_moe", "sglang-mixtral", "sglang-glm4_moe")
# The second and the third prompt share two blocks of the prefix cache, and so do the members of each group.
HEADER = tuple(2 + (3 * j + j * j) % 18 for j in range(70))
PROMPTS = [
    Prompt(i, "", tokens, "") for i, tokens in enumerate([(2, 5, 9), HEADER, (*HEADER[:64], 3, 4), HEADER[5:40]])
]
SAMPLING = SamplingRequest(group_size=4, temperature=1.0, max_tokens=24, seed=1, expert_choices=True)
SETTINGS: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 8, "kv_cache_tokens": None, "return_experts": True}


def _marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.long] * (name in LONG) + [sglang_here] * (CASES[name].kind == "sglang")


@pytest.fixture(scope="module", params=[pytest.param(name, marks=_marks(name)) for name in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def world(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRanks]:
    """A rank with a policy and an engine that has the same weights."""
    config = raw_family_config(case.family, num_hidden_layers=NUM_LAYERS, **case.settings)
    model = make_family_model(tmp_path_factory.mktemp("models") / "moe", config)
    with engine_ranks(1, tmp_path_factory.mktemp("ranks"), prepare_policy) as ranks:
        ranks.open(model, tp=1, kind=case.kind, **SETTINGS)
        ranks.call(build, model)
        yield ranks


# Functions that run on the rank.


def prepare_policy(session: RankSession) -> None:
    """Import the policy before the engine, as a job does: the import prepares Megatron for machines without CUDA."""
    import os

    import grpo_mega.policy.policy  # noqa: F401

    os.environ.update(RANK="0", WORLD_SIZE="1")


def build(session: RankSession, model: Path) -> None:
    from safetensors.torch import load_file

    from grpo_mega.policy.policy import MegatronPolicy

    keys = {
        "model": {"path": str(model)},
        "data": {"train": "arithmetic:train"},
        "reward": {"terms": [{"name": "exact"}]},
        "train": {"steps": 1},
        "precision": {"dtype": "fp32"},
    }
    ranks = init_ranks(Topology(1, 1, 1, 1), 60.0)
    session.kept["policy"] = MegatronPolicy(
        Config.model_validate(keys), read_spec(model), model, ranks, with_reference=False
    )
    tensors, sink = load_file(model / "model.safetensors"), session.engine.sink
    sink.begin_update()
    for region in sink.layout():
        hf = region.placement.hf
        sink.write(hf, tensors[hf.name][hf.index])
    sink.end_update(0)


def generate(session: RankSession, prompts: list[Prompt], sampling: SamplingRequest) -> list[list[Completion]]:
    groups: list[list[Completion]] = session.engine.generate(prompts, sampling)
    return groups


def chosen(session: RankSession, rollouts: list[Rollout], noise: float) -> list[Tensor]:
    """Return [N, expert layers, K] per rollout: the choices of the policy's routers, with `noise` on their weights."""
    policy = session.kept["policy"]
    ones, row_tokens = [1.0] * len(rollouts), sum(r.num_tokens for r in rollouts)
    row = pack(list(enumerate(rollouts)), row_tokens=row_tokens, advantages=ones, token_weights=ones, pad_id=0)
    seen: dict[int, Tensor] = {}
    undo = []
    for number, layer in enumerate(policy.parts.models[0].decoder.layers):
        router = getattr(layer.mlp, "router", None)
        if router is not None:
            undo.append((router, router.router_replay.get_replay_topk, router.weight.detach().clone()))
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                router.weight += noise * torch.randn(router.weight.shape, generator=generator)
            router.router_replay.get_replay_topk = _recording(router.router_replay.get_replay_topk, seen, number)
    policy.log_probs([row])
    for router, found, weight in undo:
        router.router_replay.get_replay_topk = found
        with torch.no_grad():
            router.weight.copy_(weight)
    whole = torch.stack([seen[number] for number in sorted(seen)], 1)
    return list(whole.split([r.num_tokens for r in rollouts]))


def _recording(function: Any, seen: dict[int, Tensor], number: int) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        seen[number] = found[1]
        return found

    return wrapper


def bind_to_linear(session: RankSession) -> str:
    from grpo_mega.engines.vllm.routing import bind_routers

    runner = session.engine._llm.model_executor.driver_worker.worker.model_runner
    try:
        bind_routers(torch.nn.Linear(2, 2), runner.vllm_config)
    except UserError as error:
        return str(error)
    return "accepted"


# Expected values.


def with_choices(rollouts: list[Rollout], choices: list[Tensor | None]) -> list[Rollout]:
    return [
        replace(r, completion=replace(r.completion, expert_choices=c)) for r, c in zip(rollouts, choices, strict=True)
    ]


def rollouts_of(prompts: list[Prompt], groups: list[list[Completion]]) -> list[Rollout]:
    return [Rollout(p, c, Reward(0.0), 0) for p, group in zip(prompts, groups, strict=True) for c in group]


def record_of(rollout: Rollout, case: Case) -> Tensor:
    """Return the record [N, expert layers, K], sorted; every token except the last has one."""
    record = rollout.completion.expert_choices
    assert record is not None
    assert record.dtype == torch.uint8
    assert tuple(record.shape[:2]) == (rollout.num_tokens - 1, NUM_LAYERS)
    wide = widen_record(record)[:, case.expert_layers]
    assert bool((wide >= 0).all())
    return wide.long().sort(-1).values


def differing(case: Case, rollouts: list[Rollout], routed: list[Tensor]) -> tuple[int, int]:
    """Return (choices that differ from the record, all choices), counted per token and layer."""
    wrong = total = 0
    for rollout, own in zip(rollouts, routed, strict=True):
        record = record_of(rollout, case)
        assert record.shape[1:] == own.shape[1:]
        wrong += int((record != own[: len(record)].sort(-1).values).any(-1).sum())
        total += record.shape[0] * record.shape[1]
    return wrong, total


@pytest.fixture(scope="module")
def rollouts(world: EngineRanks) -> list[Rollout]:
    return rollouts_of(PROMPTS, world.call(generate, PROMPTS, SAMPLING)[0])


def test_the_engine_records_the_choices_of_the_policys_routers_for_every_token_except_the_last(
    case: Case, world: EngineRanks, rollouts: list[Rollout]
) -> None:
    plain = with_choices(rollouts, [None] * len(rollouts))
    wrong, total = differing(case, rollouts, world.call(chosen, plain, 0.0)[0])
    assert total > 1000
    assert wrong <= total // 1000  # scores that differ only by rounding
    # the records are not constant
    assert len(torch.cat([record_of(r, case).flatten() for r in rollouts]).unique()) >= 4


def test_changed_routers_follow_the_record_exactly_and_choose_other_experts_without_it(
    case: Case, world: EngineRanks, rollouts: list[Rollout]
) -> None:
    wrong, total = differing(case, rollouts, world.call(chosen, rollouts, 0.2)[0])
    assert wrong == 0
    plain = with_choices(rollouts, [None] * len(rollouts))
    wrong, _ = differing(case, rollouts, world.call(chosen, plain, 0.2)[0])
    assert wrong > total // 10


def test_a_second_turn_from_the_prefix_cache_has_the_record_of_the_whole_sequence(
    case: Case, world: EngineRanks
) -> None:
    (first,) = world.call(generate, PROMPTS[1:2], replace(SAMPLING, group_size=1))[0]
    longer = [replace(PROMPTS[1], token_ids=(*PROMPTS[1].token_ids, *first[0].token_ids, 4, 7))]
    again = replace(SAMPLING, group_size=2, max_tokens=8, continues=True)
    found = rollouts_of(longer, world.call(generate, longer, again)[0])
    wrong, total = differing(case, found, world.call(chosen, with_choices(found, [None] * 2), 0.0)[0])
    assert wrong <= total // 1000


def test_a_request_without_expert_choices_returns_none(world: EngineRanks) -> None:
    (group, *_) = world.call(generate, PROMPTS[:1], replace(SAMPLING, expert_choices=False))[0]
    assert all(completion.expert_choices is None for completion in group)


@pytest.mark.parametrize(
    "case", [pytest.param("sglang-glm4_moe", marks=_marks("sglang-glm4_moe"))], indirect=True, scope="module"
)
def test_sglang_has_no_record_for_a_layer_without_a_router(case: Case, rollouts: list[Rollout]) -> None:
    for rollout in rollouts:
        assert rollout.completion.expert_choices is not None
        assert bool((widen_record(rollout.completion.expert_choices)[:, 0] == -1).all())


@pytest.mark.parametrize("case", ["vllm-qwen3_moe"], indirect=True, scope="module")
def test_a_model_whose_routers_cannot_be_recorded_is_rejected(world: EngineRanks) -> None:
    assert world.call(bind_to_linear)[0].startswith(
        "algorithm.routing_replay=true: engine.kind=vllm cannot record the experts of Linear ("
    )
