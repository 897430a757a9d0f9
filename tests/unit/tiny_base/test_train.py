"""Tiny base models: their examples, and one recipe gives one model."""

import hashlib
import json
import multiprocessing
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_mega.config.model_sections import ArchitectureConfig, BaseConfig
from grpo_mega.data import arithmetic
from grpo_mega.data.chat import load_tokenizer
from grpo_mega.tiny_base import ensure_base, train
from grpo_mega.tiny_base.examples import arithmetic_examples, gsm8k_examples, with_mistake
from grpo_mega.tiny_base.train import RECIPE_VERSION, recipe_digest
from grpo_mega.types import UserError

TINY = ArchitectureConfig(
    num_layers=1, hidden_size=16, ffn_size=16, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=128
)


def _recipe(cache: Path, **changes: object) -> BaseConfig:
    facts = {"task": "arithmetic", "architecture": TINY, "steps": 3, "batch_size": 4, "cache_dir": str(cache)}
    return BaseConfig(**{**facts, **changes})


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def _ensure_with_threads(cache: str, threads: int, seed: int) -> str:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    return str(ensure_base(_recipe(Path(cache)), "arithmetic:train"))


def test_mistakes_are_never_the_right_answer() -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(3000):
        number = str(rng.randrange(199))
        flawed = with_mistake(number, rng)
        assert flawed.strip() != number
        assert flawed.strip() == flawed != ""
        seen.add("blank" if " " in flawed else "missing" if len(flawed) < len(number) else "digit")
    assert seen == {"blank", "missing", "digit"}


def test_the_requested_fraction_of_arithmetic_examples_is_flawed_and_all_are_pretraining_pairs() -> None:
    draw, rng = arithmetic_examples(0.5), random.Random(0)
    right = {arithmetic.question(pair): arithmetic.answer(pair) for pair in arithmetic.pairs("pretrain")}
    examples = [draw(rng) for _ in range(4000)]
    share = sum(right[prompt] != completion for prompt, completion in examples) / len(examples)
    assert 0.46 < share < 0.54


def _gsm8k(path: Path, count: int = 4) -> Path:
    solution = "So <<1+1=2>>2.\nIn all <<40+{0}=4{0}>>4{0} clips.\n#### 4{0}"
    rows = [{"question": f"Question {i}?", "answer": solution.format(i)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gsm8k_examples_are_the_last_calculation_with_and_without_the_format(tmp_path: Path) -> None:
    draw, rng = gsm8k_examples(_gsm8k(tmp_path / "t.jsonl"), 0.5, max_bytes=100), random.Random(0)
    assert {draw(rng) for _ in range(200)} == {
        ("Question 0?", "\n40+0=40\n#### 40"),
        ("Question 0?", "\n40+0=40\n40"),
        ("Question 1?", "\n40+1=41\n#### 41"),
        ("Question 1?", "\n40+1=41\n41"),
    }, "the first half of the file, nothing else"


def test_a_byte_order_mark_at_the_start_of_a_gsm8k_file_is_skipped(tmp_path: Path) -> None:
    path = _gsm8k(tmp_path / "t.jsonl")
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert gsm8k_examples(path, 0.5, max_bytes=100)(random.Random(0))[0].startswith("Question")


def test_the_requested_fraction_of_examples_calls_the_calculator(tmp_path: Path) -> None:
    draw, rng = gsm8k_examples(_gsm8k(tmp_path / "t.jsonl"), 0.5, max_bytes=100, tool_fraction=0.5), random.Random(0)
    drawn = [draw(rng)[1] for _ in range(400)]
    assert {text for text in drawn if "<<" in text} == {
        f"\n<<40+{i}>>4{i}\n{mark}4{i}" for i in (0, 1) for mark in ("", "#### ")
    }
    assert 150 < sum("<<" in text for text in drawn) < 250
    sums, rng = arithmetic_examples(0.5, tool_fraction=0.5), random.Random(0)
    for question, completion in (sums(rng) for _ in range(200)):
        if completion.startswith("<<"):
            called, _, result = completion.removeprefix("<<").partition(">>")
            assert (called + "=", int(result)) == (question, sum(map(int, called.split("+"))))


def test_the_digest_of_a_recipe_without_tools_is_unchanged(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path / "c")
    facts = recipe.model_dump(mode="json", exclude={"cache_dir", "examples", "tool_fraction"})
    known = hashlib.sha256(json.dumps(facts | {"recipe_version": RECIPE_VERSION}, sort_keys=True).encode()).hexdigest()
    assert recipe_digest(recipe, "") == known
    assert recipe_digest(recipe.model_copy(update={"tool_fraction": 0.5}), "") != known


def test_bad_gsm8k_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer=char .* use model\.base\.tokenizer=byte"):
        ensure_base(_recipe(tmp_path / "c", task="gsm8k"), str(_gsm8k(tmp_path / "good.jsonl")))
    with pytest.raises(UserError, match=r"model\.base\.examples=.*no such file; put GSM8K"):
        ensure_base(_recipe(tmp_path / "c", task="gsm8k", tokenizer="byte"), str(tmp_path / "none.jsonl"))
    path = tmp_path / "t.jsonl"
    path.write_text('{"question": "q", "answer": "no mark"}\n')
    with pytest.raises(UserError, match=r"t\.jsonl:1: not a GSM8K example"):
        gsm8k_examples(path, 0.5, max_bytes=100)
    path.write_text("")
    with pytest.raises(UserError, match="is empty"):
        gsm8k_examples(path, 0.5, max_bytes=100)
    with pytest.raises(UserError, match=r"no example of at most 20 bytes.*max_positions"):
        gsm8k_examples(_gsm8k(path), 0.5, max_bytes=20)
    assert not (tmp_path / "c").exists(), "nothing is created for input that is wrong"


def test_batch_labels_the_completion_and_its_eos_alone() -> None:
    tokenizer = train.base_tokenizer(BaseConfig(task="arithmetic"))
    token_ids, labels = train._batch([("1+2=", "3"), ("90+12=", "102")], tokenizer)
    none = train.IGNORED
    assert token_ids.tolist() == [[3, 12, 4, 13, 5, 1, 0, 0, 0, 0], [11, 2, 12, 3, 4, 13, 3, 2, 4, 1]]
    assert labels.tolist() == [[none] * 3 + [5, 1] + [none] * 5, [none] * 5 + [3, 2, 4, 1, none]]


def test_the_base_does_not_depend_on_threads_or_seed_of_the_caller(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        one = Path(_ensure_with_threads(str(tmp_path / "a"), threads=1, seed=1))
        two = Path(_ensure_with_threads(str(tmp_path / "b"), threads=2, seed=2))
        assert torch.get_num_threads() == 2, "the caller's threads are restored"
    finally:
        torch.set_num_threads(before)
    assert one.name == two.name
    assert _weights(one) == _weights(two)


def test_pretraining_restores_the_random_state_of_the_caller(tmp_path: Path) -> None:
    torch.manual_seed(3)
    random.seed(3)
    expected = (torch.rand(3).tolist(), random.random())
    torch.manual_seed(3)
    random.seed(3)
    ensure_base(_recipe(tmp_path), "arithmetic:train")
    assert (torch.rand(3).tolist(), random.random()) == expected


def test_a_second_call_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ensure_base(_recipe(tmp_path), "arithmetic:train")

    def fail(*_: object) -> None:
        raise AssertionError("pre-trained again")

    monkeypatch.setattr(train, "_pretrain", fail)
    assert ensure_base(_recipe(tmp_path), "arithmetic:train") == folder


def test_one_of_several_processes_trains(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        folders = pool.starmap(_ensure_with_threads, [(str(tmp_path), 1, seed) for seed in range(3)])
    assert len(set(folders)) == 1
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([Path(folders[0]).name, Path(folders[0]).name + ".lock"]), "nothing unfinished is left"


def test_a_lock_that_is_never_released_is_an_error_and_not_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "LOCK_TIMEOUT_SECONDS", 0.3)
    lock = tmp_path / "x.lock"
    with (
        train._exclusive_lock(lock),
        pytest.raises(RuntimeError, match="locked by another process"),
        train._exclusive_lock(lock),
    ):
        pass


def test_the_digest_changes_with_everything_that_the_weights_depend_on(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    changes: list[dict[str, object]] = [{"steps": 4}, {"seed": 1}, {"flawed_fraction": 0.4}, {"learning_rate": 0.1}]
    changes.append({"architecture": TINY.model_copy(update={"num_layers": 2})})
    digests = {train.recipe_digest(_recipe(tmp_path, **change), "x") for change in [{}, *changes]}
    assert len(digests) == 1 + len(changes)
    assert train.recipe_digest(_recipe(tmp_path / "elsewhere"), "y") == train.recipe_digest(recipe, "x")
    gsm8k = _recipe(tmp_path, task="gsm8k", tokenizer="byte")
    first, second = _gsm8k(tmp_path / "a.jsonl", 4), _gsm8k(tmp_path / "b.jsonl", 5)
    assert train.recipe_digest(gsm8k, str(first)) != train.recipe_digest(gsm8k, str(second))


def test_the_folder_is_a_complete_hugging_face_model(tmp_path: Path) -> None:
    path = _gsm8k(tmp_path / "t.jsonl")
    folder = ensure_base(_recipe(tmp_path, task="gsm8k", tokenizer="byte"), str(path))
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == 258
    assert model.config.eos_token_id == tokenizer.eos_token_id == 1
    assert torch.isfinite(model(torch.tensor([tokenizer.encode("Question")])).logits).all()
