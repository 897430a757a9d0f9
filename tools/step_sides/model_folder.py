"""Writes a random Qwen3 model whose completions end with EOS, and prompts for it.

Feature 0 of the hidden states is almost constant: every embedding has a large entry there, and no layer writes it. The
row of the head for EOS reads only that feature, so the probability of EOS is nearly the same at every position.
Therefore lengths have a geometric distribution, with p95/p50 about 4.3. The logits of other tokens are random.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from grpo_mega.data.tokenizers import char_tokenizer

FIRST_CHARACTER = 0x4E00  # start of a Unicode block with thousands of letters, one token each
CONSTANT = (
    32.0  # value of feature 0, large compared with the others (0.06 in an embedding, below 1 after the last layer)
)
ENDLESS_WEIGHT = -4.0  # of EOS on a feature of about 16: its probability is e^-64
SPECIAL_TOKENS = 2  # <pad> and <eos>


@dataclass(frozen=True)
class Architecture:
    """Sizes of the model."""

    num_layers: int = 4
    hidden_size: int = 256
    ffn_size: int = 768
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    vocab_size: int = 2048
    max_positions: int = 512


def make_model(folder: Path, shape: Architecture, mean_length: float | None) -> int:
    """Write the model as a Hugging Face folder.

    Args:
        folder: output folder.
        shape: sizes of the model.
        mean_length: mean completion length without a limit, in tokens; None: completions do not end.

    Returns:
        The number of parameters.
    """
    alphabet = "".join(chr(FIRST_CHARACTER + i) for i in range(shape.vocab_size - SPECIAL_TOKENS))
    tokenizer = char_tokenizer(alphabet)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(_config(shape, tokenizer.eos_token_id, tokenizer.pad_token_id)).float()
    eos = int(tokenizer.eos_token_id)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = CONSTANT
        for layer in model.model.layers:
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight *= 0.1
                output.weight[0] = 0
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[eos] = 0
        model.lm_head.weight[eos, 0] = ENDLESS_WEIGHT if mean_length is None else _eos_weight(model, eos, mean_length)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(sum(p.numel() for p in model.parameters()))


def write_prompts(path: Path, shape: Architecture, num_prompts: int, num_tokens: range) -> None:
    """Write random prompts as JSONL; their lengths increase over the range `num_tokens`."""
    rng = random.Random(0)
    rows = []
    for i in range(num_prompts):
        length = num_tokens[i * len(num_tokens) // num_prompts]
        drawn = (rng.randrange(shape.vocab_size - SPECIAL_TOKENS) for _ in range(length))
        rows.append({"prompt": "".join(chr(FIRST_CHARACTER + d) for d in drawn), "answer": ""})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _config(shape: Architecture, eos: int, pad: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=False,
        initializer_range=shape.hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )


def _eos_weight(model: Qwen3ForCausalLM, eos: int, mean_length: float) -> float:
    """Return w with mean over positions of p(EOS) = sigmoid(w * feature - logsumexp(others)) equal to 1/mean_length."""
    token_ids = torch.randint(SPECIAL_TOKENS, model.config.vocab_size, (16, 128))
    hidden = model.model(input_ids=token_ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)
    logits[..., eos] = -torch.inf
    feature, others = hidden[..., 0], logits.logsumexp(-1)
    low, high = 0.0, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        too_often = torch.sigmoid(middle * feature - others).mean() > 1 / mean_length
        low, high = (low, middle) if too_often else (middle, high)
    return low
