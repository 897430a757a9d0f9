"""Pre-trains a tiny Qwen3 model on worked examples, once, and keeps it under the digest of its recipe.

Invariants (tests/unit/tiny_base/test_train.py): the same recipe gives the same bytes for any number of threads of the
caller; the caller's random state and threads are restored; of several processes one trains and the others wait; a
folder that exists is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from grpo_mega.config.model_sections import BaseConfig
from grpo_mega.config.schema import Config
from grpo_mega.data import arithmetic
from grpo_mega.data.tokenizers import byte_tokenizer, char_tokenizer
from grpo_mega.tiny_base.examples import Draw, Example, arithmetic_examples, gsm8k_examples
from grpo_mega.types import UserError

log = logging.getLogger("grpo_mega.tiny_base")

RECIPE_VERSION = 1
"""Increase it with any change to this file or to the examples that changes the pre-trained weights."""
NUM_THREADS = 1
"""Sums are split over threads, so the number of threads is part of the recipe; every machine offers one."""
WARMUP_FRACTION = 0.05
BETAS = (0.9, 0.99)
CLIP_GRAD = 1.0
IGNORED = -100
LOG_SECONDS = 5.0
LOCK_TIMEOUT_SECONDS = 900.0


def model_folder_of(config: Config) -> Path:
    """Return the folder of `model.path`, or of the base of `model.base`, which is pre-trained if it does not exist.

    Raises:
        UserError, RuntimeError: see `ensure_base`.
    """
    if config.model.base is None:
        return config.model.folder
    return ensure_base(config.model.base, config.data.train_sets[0].path)


def ensure_base(recipe: BaseConfig, train_file: str) -> Path:
    """Return the Hugging Face folder of the pre-trained base; train it first if `recipe.cache_dir` does not contain it.

    Every rank may call this: one process per machine trains, and the others wait.

    Args:
        recipe: task, architecture and schedule of the base.
        train_file: `data.train`, the examples of a gsm8k base whose recipe names no file.

    Raises:
        UserError: the examples cannot be read, are longer than the model's positions, or cannot be encoded.
        RuntimeError: another process held the lock for longer than the time limit.
    """
    examples = Path(recipe.examples or train_file)
    cache_dir = Path(recipe.cache_dir)
    # The examples are read first, so that a missing file is reported before any folder is created.
    draw = _examples(recipe, examples)
    folder = cache_dir / f"{recipe.task}-{recipe_digest(recipe, train_file)[:16]}"
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _exclusive_lock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            tokenizer = base_tokenizer(recipe)
            model = _pretrain(recipe, tokenizer, draw)
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            unfinished.rename(folder)
    return folder


def recipe_digest(recipe: BaseConfig, train_file: str) -> str:
    """Return the SHA-256 of the recipe, the bytes of the examples and RECIPE_VERSION, which determine the weights."""
    facts = recipe.model_dump(mode="json", exclude={"cache_dir", "examples"})
    facts["recipe_version"] = RECIPE_VERSION
    if not recipe.tool_fraction:  # recipes without tools keep the digest of earlier versions
        del facts["tool_fraction"]
    if recipe.task == "gsm8k":
        facts["examples_sha256"] = hashlib.sha256(Path(recipe.examples or train_file).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _examples(recipe: BaseConfig, path: Path) -> Draw:
    if recipe.task == "gsm8k" and recipe.tokenizer == "char":
        raise UserError(
            "model.base.tokenizer=char has only digits and signs, and GSM8K is prose",
            remedy="use model.base.tokenizer=byte",
        )
    if recipe.task == "arithmetic":
        return arithmetic_examples(recipe.flawed_fraction, recipe.tool_fraction)
    max_bytes = recipe.architecture.max_positions - 1 - (len("<<>>=") if recipe.tool_fraction else 0)
    return gsm8k_examples(path, recipe.flawed_fraction, max_bytes=max_bytes, tool_fraction=recipe.tool_fraction)


def base_tokenizer(recipe: BaseConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a recipe; the base model need not exist."""
    return char_tokenizer(arithmetic.ALPHABET) if recipe.tokenizer == "char" else byte_tokenizer()


@contextmanager
def _exclusive_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`, which the system releases when the process exits."""
    with path.open("w") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    log.info("another process pre-trains the base model; waiting for it (%s)", path)
                waiting = True
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{path} has been locked by another process for {LOCK_TIMEOUT_SECONDS:.0f} s; end that process"
                )
            time.sleep(0.2)
        yield


@contextmanager
def _fixed_random_state(seed: int) -> Iterator[None]:
    """Set the number of threads and the seed; restore the caller's threads and random state afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(NUM_THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def base_config(recipe: BaseConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """Return the architecture of a recipe; the base model need not exist."""
    shape = recipe.architecture
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tie_embeddings,
        # With the usual 0.02, so narrow a model spends most of its few steps on increasing its weights.
        initializer_range=shape.hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        attn_implementation="sdpa",
    )


def _build(recipe: BaseConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(base_config(recipe, tokenizer)).float()


def _batch(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return token ids and labels [B, T], padded on the right; only the completion and its EOS have labels.

    Right padding needs no attention mask: in a causal model no position with a label attends to it.
    """
    rows = [(tokenizer.encode(prompt), tokenizer.encode(completion)) for prompt, completion in examples]
    width = max(len(prompt) + len(completion) for prompt, completion in rows) + 1
    token_ids = torch.full((len(rows), width), int(tokenizer.pad_token_id))
    labels = torch.full((len(rows), width), IGNORED)
    for row, (prompt, completion) in enumerate(rows):
        tokens = torch.tensor([*prompt, *completion, tokenizer.eos_token_id])
        token_ids[row, : len(tokens)] = tokens
        labels[row, len(prompt) - 1 : len(tokens) - 1] = tokens[len(prompt) :]
    return token_ids, labels


def _learning_rate(recipe: BaseConfig, step: int) -> float:
    """Return the learning rate: a linear warm-up, then a cosine decay to zero."""
    warmup = max(1, round(WARMUP_FRACTION * recipe.steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.steps - warmup)))


def _pretrain(recipe: BaseConfig, tokenizer: PreTrainedTokenizerBase, draw: Draw) -> Qwen3ForCausalLM:
    """Train with next-token cross entropy on the completions and AdamW."""
    rng = random.Random(recipe.seed)
    started = logged = time.monotonic()
    log.info("pre-training a base model on %s: %d steps of %d examples", recipe.task, recipe.steps, recipe.batch_size)
    with _fixed_random_state(recipe.seed):
        model = _build(recipe, tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=BETAS, weight_decay=0.0)
        for step in range(recipe.steps):
            token_ids, labels = _batch([draw(rng) for _ in range(recipe.batch_size)], tokenizer)
            hidden = model.model(input_ids=token_ids, use_cache=False).last_hidden_state
            has_label = labels != IGNORED
            loss = functional.cross_entropy(model.lm_head(hidden[has_label]), labels[has_label])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
            optimizer.param_groups[0]["lr"] = _learning_rate(recipe, step)
            optimizer.step()
            if time.monotonic() - logged > LOG_SECONDS or step + 1 == recipe.steps:
                logged = time.monotonic()
                log.info(
                    "pre-training step %d/%d, loss %.3f, %.0f s", step + 1, recipe.steps, loss.item(), logged - started
                )
    return model.eval()
