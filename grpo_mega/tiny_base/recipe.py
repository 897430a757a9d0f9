"""The parts of the recipe of a tiny base: its tokenizer, its config.json, its examples and its digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase, Qwen3Config

from grpo_mega.config.model_sections import BaseConfig
from grpo_mega.data import arithmetic
from grpo_mega.data.tokenizers import byte_tokenizer, char_tokenizer
from grpo_mega.models.tiny_recipe import recipe_spec
from grpo_mega.tiny_base.examples import Draw, arithmetic_examples, gsm8k_examples
from grpo_mega.types import UserError

RECIPE_VERSION = 2
"""Increase it with any change to the examples or their training that changes the pre-trained weights."""


def base_tokenizer(recipe: BaseConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a recipe; the base model need not exist."""
    return char_tokenizer(arithmetic.ALPHABET) if recipe.tokenizer == "char" else byte_tokenizer()


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
        initializer_range=recipe_spec(shape).initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def save_untrained(recipe: BaseConfig, folder: Path) -> None:
    """Write config.json and the tokenizer of a recipe: a model folder for `model.init: random`."""
    tokenizer = base_tokenizer(recipe)
    base_config(recipe, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def examples_of(recipe: BaseConfig, path: Path) -> Draw:
    """Return the function that draws worked examples.

    Args:
        recipe: task and fractions.
        path: examples of a gsm8k base.

    Raises:
        UserError: the examples cannot be read, are longer than the model's positions, or cannot be encoded.
    """
    if recipe.task == "gsm8k" and recipe.tokenizer == "char":
        raise UserError(
            "model.base.tokenizer=char has only digits and signs, and GSM8K is prose",
            remedy="use model.base.tokenizer=byte",
        )
    if recipe.task == "arithmetic":
        return arithmetic_examples(recipe.flawed_fraction, recipe.tool_fraction)
    max_bytes = recipe.architecture.max_positions - 1 - (len("<<>>=") if recipe.tool_fraction else 0)
    return gsm8k_examples(path, recipe.flawed_fraction, max_bytes=max_bytes, tool_fraction=recipe.tool_fraction)


def recipe_digest(recipe: BaseConfig, train_file: str) -> str:
    """Return the SHA-256 of the recipe, the bytes of the examples and RECIPE_VERSION, which determine the weights."""
    facts = recipe.model_dump(mode="json", exclude={"cache_dir", "examples"})
    facts["recipe_version"] = RECIPE_VERSION
    if recipe.task == "gsm8k":
        facts["examples_sha256"] = hashlib.sha256(Path(recipe.examples or train_file).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
