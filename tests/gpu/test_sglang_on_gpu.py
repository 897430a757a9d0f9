"""SGLang on GPUs in bf16, in an environment of constraints/cuda-sglang.txt: the tests of tests/engine with CUDA."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_mega.models.digest import slice_digest
from grpo_mega.types import Completion
from tests.helpers.engine_contract import PROMPTS, SAMPLING, generate, tokens
from tests.helpers.engine_ranks import EngineRanks, RankSession, engine_ranks
from tests.helpers.family_configs import raw_family_config
from tests.helpers.tiny_models import make_family_model, make_tiny_model
from tools import gpu_proof

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.timeout(3600),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="this environment has another engine"),
]

_START_SECONDS = 600.0  # kernels are compiled and CUDA graphs are captured
_CLOSE, _FAR = (
    0.2,
    1.0,
)  # mean nats per token: limit for equal weights in bf16 (at most 0.06 without CUDA), minimum for other weights
# Heads and rows that every attention and expert kernel supports.
DENSE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
EXPERTS = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128, "mlp_only_layers": []}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make two sets of weights of each kind, and a folder without weights, from which engines are built."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for seed, name in enumerate(("dense", "dense-other")):
        found[name] = make_tiny_model(root / name, seed=seed, **DENSE)
    for seed, name in enumerate(("experts", "experts-other")):
        found[name] = make_family_model(root / name, raw_family_config("qwen3_moe", **EXPERTS), seed=seed)
    for name in ("dense", "experts"):
        bare = shutil.copytree(root / name, root / f"{name}-bare", ignore=shutil.ignore_patterns("*.safetensors"))
        found[f"{name}-bare"] = Path(bare)
    return found


def set_device(session: RankSession) -> None:
    torch.cuda.set_device(session.rank)


def start_engine(session: RankSession, folder: Path, tp: int, ep: int) -> None:
    from grpo_mega.engines.sglang.arguments import SglangSettings
    from grpo_mega.engines.sglang.engine import SglangEngine

    if session.engine is not None:
        session.engine.close()
    session.engine = SglangEngine(
        SglangSettings(
            folder, dtype="bf16", tp=tp, ep=ep, max_model_len=96, max_num_seqs=48, kv_cache_tokens=None, seed=0
        )
    )


def push_bf16(session: RankSession, folder: Path, version: int, flip_bit: bool = False) -> list[str]:
    """Write a folder's weights from the device; return the slices whose digest differs afterwards."""
    from safetensors.torch import load_file

    tensors, sink = load_file(folder / "model.safetensors", device=f"cuda:{session.rank}"), session.engine.sink
    sent = {}
    sink.begin_update()
    for region in sink.layout():
        hf = region.placement.hf
        values = tensors[hf.name][hf.index].to(region.dtype)
        sent[hf] = slice_digest(values, hf)
        sink.write(hf, values)
    if flip_bit:
        session.engine._client._staging.memory[session.engine._client._staged[-1][2] + 1] ^= 4
    sink.end_update(version)
    assert sink.probe() == {}
    held = zip(sent, sink.digests(list(sent)), strict=True)
    return [hf.name for hf, digest in held if digest != sent[hf]]


def mean_error(folder: Path, groups: list[list[Completion]]) -> float:
    """Return the mean difference of log-probs to transformers in bf16 on the device."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    errors = []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]], device="cuda")
            with torch.no_grad():
                log_probs = torch.log_softmax(model(ids).logits[0, len(prompt.token_ids) - 1 : -1].float(), -1)
            expected = log_probs.cpu().gather(1, torch.from_numpy(completion.token_ids).long()[:, None])[:, 0]
            errors.append((expected - torch.from_numpy(completion.sampler_log_probs)).abs())
    return float(torch.cat(errors).mean())


@pytest.fixture(scope="module")
def single_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRanks]:
    with engine_ranks(1, tmp_path_factory.mktemp("ranks"), set_device) as ranks:
        yield ranks


@pytest.fixture(scope="module", params=["dense", "experts"])
def engine(
    request: pytest.FixtureRequest, single_rank: EngineRanks, models: dict[str, Path]
) -> tuple[EngineRanks, str]:
    name: str = request.param
    single_rank.call(start_engine, models[f"{name}-bare"], 1, 1, timeout_seconds=_START_SECONDS)
    return single_rank, name


def test_log_probs_match_the_written_weights(engine: tuple[EngineRanks, str], models: dict[str, Path]) -> None:
    ranks, name = engine
    for version, (mine, theirs) in enumerate([(name, f"{name}-other"), (f"{name}-other", name)]):
        assert ranks.call(push_bf16, models[mine], version) == [[]]
        groups = ranks.call(generate, PROMPTS, SAMPLING)[0]
        assert mean_error(models[mine], groups) < _CLOSE
        assert mean_error(models[theirs], groups) > _FAR
        assert {c.policy_version for group in groups for c in group} == {version}


def test_the_seed_determines_the_tokens(engine: tuple[EngineRanks, str], models: dict[str, Path]) -> None:
    ranks, name = engine
    ranks.call(push_bf16, models[name], 0)
    first, other, again = (ranks.call(generate, PROMPTS, replace(SAMPLING, seed=seed))[0] for seed in (5, 6, 5))
    assert tokens(first) == tokens(again)
    assert tokens(first) != tokens(other)


def test_a_bit_that_changes_between_rank_and_scheduler_is_found_by_the_digest(
    engine: tuple[EngineRanks, str], models: dict[str, Path]
) -> None:
    ranks, name = engine
    (wrong,) = ranks.call(push_bf16, models[name], 1, True)
    assert len(wrong) == 1


def sleep_twice(session: RankSession, folder: Path) -> dict[str, Any]:
    """Return the free bytes of the device awake, asleep and awake again, and True if the samples are equal."""
    engine = session.engine
    push_bf16(session, folder, 2)
    before = engine.generate(PROMPTS, SAMPLING)
    free = [torch.cuda.mem_get_info()[0]]
    for version in (3, 4):
        engine.sleep()
        free.append(torch.cuda.mem_get_info()[0])
        engine.wake("weights")
        engine.wake("kv_cache")
        with pytest.raises(RuntimeError, match="before the weights are complete"):
            engine.generate(PROMPTS, SAMPLING)  # the content of released memory is undefined after it is restored
        engine.sleep()
        engine.wake("weights")
        wrong = push_bf16(session, folder, version)
        assert wrong == []
        engine.wake("kv_cache")
        free.append(torch.cuda.mem_get_info()[0])
    return {"free": free, "same": tokens(engine.generate(PROMPTS, SAMPLING)) == tokens(before)}


def test_sleep_releases_weights_and_cache_and_a_sync_restores_the_weights(
    engine: tuple[EngineRanks, str], models: dict[str, Path]
) -> None:
    ranks, name = engine
    (found,) = ranks.call(sleep_twice, models[name])
    total = torch.cuda.mem_get_info()[1]
    awake, asleep, again, asleep_again, last = found["free"]
    assert asleep - awake > 0.4 * total  # part of the 0.6 that the engine uses
    assert asleep_again > asleep - 256 * 2**20
    assert max(again, last) < awake + 256 * 2**20
    assert found["same"]


@pytest.mark.gpu(2)
@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (2, 2)])
def test_both_ranks_of_an_engine_write_their_weights_and_return_the_same_completions(
    models: dict[str, Path], tmp_path: Path, tp: int, ep: int
) -> None:
    with engine_ranks(2, tmp_path, set_device) as ranks:
        ranks.call(start_engine, models["experts-bare"], tp, ep, timeout_seconds=_START_SECONDS)
        for version, mine in enumerate(("experts", "experts-other")):
            assert ranks.call(push_bf16, models[mine], version) == [[], []]
            first, second = ranks.call(generate, PROMPTS, SAMPLING)
            assert first == second
            assert mean_error(models[mine], first) < _CLOSE


def test_a_policy_on_the_same_gpu_syncs_sleeps_and_has_the_same_log_probs(tmp_path: Path) -> None:
    code = gpu_proof.main(["--parts", "engine_sglang", "--size", "small", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "gpu_engine_sglang.json").read_text())
    assert code == 0, result.get("why")
    found = result["numbers"]
    assert found["sleep"]["growth_bytes"] < 256 * 2**20
    assert found["mismatch"]["kl"] < 0.01
    assert found["sync"]["bytes"] > 0
