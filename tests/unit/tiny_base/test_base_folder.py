"""The folder of a tiny base: one recipe gives one model, trained once by supervised fine-tuning."""

import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_mega.config.model_sections import ArchitectureConfig, BaseConfig, ModelConfig
from grpo_mega.config.schema import Config
from grpo_mega.data.chat import load_tokenizer
from grpo_mega.models.config_readers import read_spec
from grpo_mega.models.tiny_recipe import recipe_spec
from grpo_mega.tiny_base import base_folder, ensure_base
from grpo_mega.tiny_base.base_folder import model_folder_of
from grpo_mega.tiny_base.recipe import recipe_digest
from grpo_mega.tiny_base.sft_run import _environment, _raise_failure
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names
from tests.helpers.gsm8k_rows import write_gsm8k

TINY = ArchitectureConfig(
    num_layers=1, hidden_size=16, ffn_size=16, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=128
)


def _recipe(cache: Path, **changes: Any) -> BaseConfig:
    facts: dict[str, Any] = {
        "task": "arithmetic",
        "architecture": TINY,
        "steps": 3,
        "batch_size": 4,
        "cache_dir": str(cache),
    }
    return BaseConfig(**{**facts, **changes})


def _ensure(cache: str, seed: int) -> str:
    torch.manual_seed(seed)
    random.seed(seed)
    return str(ensure_base(_recipe(Path(cache)), "arithmetic:train"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Let three processes make one base at the same time; return its folder."""
    cache = tmp_path_factory.mktemp("bases")
    with multiprocessing.get_context("fork").Pool(3) as pool:
        folders = set(pool.starmap(_ensure, [(str(cache), seed) for seed in range(3)]))
    assert len(folders) == 1
    return Path(folders.pop())


def test_one_of_several_processes_trains_and_leaves_nothing_unfinished(base: Path) -> None:
    assert {path.name for path in base.parent.iterdir()} == {base.name, base.name + ".lock"}


def test_the_folder_is_a_complete_hugging_face_model_of_the_recipe(base: Path) -> None:
    tokenizer, model = load_tokenizer(base), AutoModelForCausalLM.from_pretrained(base)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == 15
    assert model.config.eos_token_id == tokenizer.eos_token_id == 1
    assert torch.isfinite(model(torch.tensor([tokenizer.encode("1+2=")])).logits).all()
    assert read_spec(base) == recipe_spec(TINY, vocab_size=15)


def test_a_second_call_trains_nothing_and_keeps_the_random_state_of_the_caller(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("pre-trained again")

    monkeypatch.setattr(base_folder, "train_base", fail)
    torch.manual_seed(3)
    expected = torch.rand(3).tolist()
    torch.manual_seed(3)
    assert ensure_base(_recipe(base.parent), "arithmetic:train") == base
    assert torch.rand(3).tolist() == expected


@pytest.mark.long
def test_the_same_recipe_gives_the_same_bytes_in_any_environment(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"OMP_NUM_THREADS": "2", "RANK": "3", "WORLD_SIZE": "4", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    again = ensure_base(_recipe(tmp_path), "arithmetic:train")
    assert again.name == base.name
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (again / name).read_bytes() == (base / name).read_bytes(), name


def test_the_training_is_one_rank_on_the_cpu_whatever_started_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRPO_MEGA_HEARTBEATS", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = _environment()
    assert {name: found[name] for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")} == {
        "RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""
    }  # fmt: skip
    assert found["MASTER_PORT"] != "29500"
    assert not [name for name in found if name.startswith(("TORCHELASTIC_", "GROUP_", "GRPO_MEGA_HEARTBEATS"))]
    assert found["PATH"] == os.environ["PATH"]


def test_an_example_longer_than_the_models_positions_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    narrow = TINY.model_copy(update={"max_positions": 16})
    recipe = _recipe(tmp_path, architecture=narrow, tokenizer="byte", tool_fraction=1.0)
    with pytest.raises(UserError) as caught:
        ensure_base(recipe, "arithmetic:train")
    key = "model.base.architecture.max_positions"
    assert_names(caught.value, "tiny base", "examples.jsonl:", "data.max_example_tokens=16", key)
    assert not (tmp_path / f"arithmetic-{recipe_digest(recipe, '')[:16]}").exists()


def test_a_failed_training_is_an_error_with_the_end_of_its_output(tmp_path: Path) -> None:
    output = tmp_path / "output.log"
    output.write_text("step 1\nRuntimeError: the loss is not finite\n")
    with pytest.raises(RuntimeError, match=r"exit code 1 .*output\.log.*\n.*\nRuntimeError: the loss is not finite"):
        _raise_failure(1, output)


def test_bad_examples_are_user_errors_before_a_folder_is_created(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer=char .* use model\.base\.tokenizer=byte"):
        ensure_base(_recipe(tmp_path / "c", task="gsm8k"), str(write_gsm8k(tmp_path / "good.jsonl")))
    with pytest.raises(UserError, match=r"model\.base\.examples=.*no such file; put GSM8K"):
        ensure_base(_recipe(tmp_path / "c", task="gsm8k", tokenizer="byte"), str(tmp_path / "none.jsonl"))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("start", [{"init": "random"}, {"checkpoint": "/run/checkpoints/step_000001"}])
def test_a_run_that_does_not_start_with_the_bases_weights_gets_a_folder_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: dict[str, str]
) -> None:
    monkeypatch.setattr(base_folder, "train_base", None)
    config = Config.model_validate(
        {
            "model": ModelConfig(base=_recipe(tmp_path), **start),  # type: ignore[arg-type]
            "data": {"train": "arithmetic:train"},
            "train": {"steps": 1},
        }
    )
    folder = model_folder_of(config)
    assert not list(folder.glob("*.safetensors"))
    assert read_spec(folder) == recipe_spec(TINY, vocab_size=len(load_tokenizer(folder)))
    assert model_folder_of(config) == folder


def test_a_lock_that_is_never_released_is_an_error_and_not_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_folder, "LOCK_TIMEOUT_SECONDS", 0.3)
    lock = tmp_path / "x.lock"
    with (
        base_folder._exclusive_lock(lock),
        pytest.raises(RuntimeError, match="locked by another process"),
        base_folder._exclusive_lock(lock),
    ):
        pass


def test_the_digest_changes_with_everything_that_the_weights_depend_on(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    changes: list[dict[str, object]] = [{"steps": 4}, {"seed": 1}, {"flawed_fraction": 0.4}, {"learning_rate": 0.1}]
    changes.append({"architecture": TINY.model_copy(update={"num_layers": 2})})
    digests = {recipe_digest(_recipe(tmp_path, **change), "x") for change in [{}, *changes]}
    assert len(digests) == 1 + len(changes)
    assert recipe_digest(_recipe(tmp_path / "elsewhere"), "y") == recipe_digest(recipe, "x")
    gsm8k = _recipe(tmp_path, task="gsm8k", tokenizer="byte")
    first, second = write_gsm8k(tmp_path / "a.jsonl", 4), write_gsm8k(tmp_path / "b.jsonl", 5)
    assert recipe_digest(gsm8k, str(first)) != recipe_digest(gsm8k, str(second))
