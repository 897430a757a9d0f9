"""Engines and ranks that several test files share; tests/conftest.py keeps these files on one worker."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.helpers.engine_contract import SETTINGS, make_contract_models, push, sglang_here
from tests.helpers.engine_ranks import EngineRanks, RankSession, engine_ranks
from tests.helpers.servers import serving, write_config
from tests.helpers.synced_engine import prepare_policy

Kind = Literal["vllm", "sglang", "server"]
SETTINGS_OF_KIND: dict[Kind, dict[str, Any]] = {"vllm": {}, "sglang": {"stop_texts": True, "timeout_seconds": 200.0}}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRanks]:
    """Two ranks that may have a policy and an engine; engines are opened on demand."""
    with engine_ranks(2, tmp_path_factory.mktemp("ranks"), prepare_policy) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make the models; engines are built from `config`, which has no weights."""
    root = tmp_path_factory.mktemp("models")
    found = make_contract_models(root)
    found["config"] = Path(
        shutil.copytree(root / "qwen3", root / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    )
    return found


def keep_requests_in_the_scheduler(_session: RankSession) -> None:
    """Start SGLang's processes with the command `while_running` (tests/helpers/sglang_process_with_faults.py)."""
    from grpo_mega.engines.sglang import engine_client

    engine_client._HOST_MODULE = "tests.helpers.sglang_process_with_faults"


@pytest.fixture(scope="session", params=["vllm", pytest.param("sglang", marks=sglang_here), "server"])
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]
) -> Iterator[EngineRanks]:
    kind: Kind = request.param
    folder = tmp_path_factory.mktemp(f"{kind}-rank")

    with ExitStack() as stack:
        ranks = stack.enter_context(engine_ranks(1, folder, keep_requests_in_the_scheduler))
        if kind == "server":
            sizes = {key: SETTINGS[key] for key in ("max_model_len", "max_num_seqs")}
            config = write_config(folder / "config.yaml", models["config"], **sizes)
            server = stack.enter_context(serving([str(config)], folder / "server"))
            ranks.open(models["config"], tp=1, kind=kind, urls=(server.url,), config=config)
        else:
            ranks.open(models["config"], tp=1, kind=kind, **SETTINGS, **SETTINGS_OF_KIND[kind])
        yield ranks


@pytest.fixture
def engine(opened: EngineRanks, models: dict[str, Path]) -> EngineRanks:
    """The engine with the weights of `qwen3`, version 0."""
    opened.call(push, models["qwen3"], 0)
    return opened
