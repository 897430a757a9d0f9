"""A model whose answers have a long-tailed length distribution, and prompts for it.

tools/bench_partial.py, tools/bench_async.py and tools/bench_simulator.py train it.

It ends an answer at every token with a probability that depends on the last token of the prompt: three quarters of the
answers have a mean length of 36 tokens, and one quarter of 90, so that p99/p50 is about 8.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from tools.step_sides.model_folder import FIRST_CHARACTER, SPECIAL_TOKENS, Architecture, make_model

SHORT_MEAN, LONG_MEAN, LONG_FRACTION = 36.0, 90.0, 0.25  # tokens
MAX_TOKENS, PER_STEP, GROUP = 448, 16, 8
SHAPE = Architecture(hidden_size=128, ffn_size=384, num_heads=4, num_kv_heads=2, vocab_size=512, max_positions=512)


def write_model_and_prompts(folder: Path, num_prompts: int) -> tuple[Path, Path]:
    """Write the model and prompts into `folder`; return the folder of the model and the file of the prompts."""
    model, prompts = folder / "model", folder / "prompts.jsonl"
    make_model(model, SHAPE, SHORT_MEAN)
    _give_two_mean_lengths(model)
    _write_prompts(prompts, num_prompts)
    return model, prompts


def _give_two_mean_lengths(folder: Path) -> None:
    """Divide the tokens of the model into two halves with their own mean lengths; each half continues with itself.

    Feature 1 of a hidden state is that of the last token's embedding, 16 for the short half and -16 for the long one.
    No layer writes it. The head reads it: tokens of the other half get a logit that is lower by 40 or more.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(SHAPE.vocab_size)
    half = torch.where(ids % 2 == 0, 1.0, -1.0) * (ids >= SPECIAL_TOKENS)
    eos = int(model.config.eos_token_id)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 1] = 16.0 * half
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[1] = 0
            layer.mlp.down_proj.weight[1] = 0
        model.lm_head.weight[:, 1] = 4.0 * half
        rows = torch.randint(SPECIAL_TOKENS // 2, SHAPE.vocab_size // 2, (2, 16, 64)) * 2
        rows[1] += 1
        hidden = [model.model(input_ids=row, use_cache=False).last_hidden_state for row in rows]
        others = []
        for states in hidden:
            logits = model.lm_head(states)
            logits[..., eos] = -torch.inf
            others.append(logits.logsumexp(-1))
        # the probability of EOS is sigmoid(w0 * feature 0 + w1 * feature 1 - others), with the same means of both sides
        features = torch.stack([torch.stack([h[..., 0].mean(), h[..., 1].mean()]) for h in hidden])
        wanted = torch.tensor([1 / SHORT_MEAN, 1 / LONG_MEAN]).logit() + torch.stack([o.mean() for o in others])
        model.lm_head.weight[eos, :2] = torch.linalg.solve(features, wanted)
    model.save_pretrained(folder)


def _write_prompts(path: Path, num_prompts: int) -> None:
    """Write random prompts; the last token decides the mean length of the answers."""
    rng = random.Random(0)
    rows = []
    for _ in range(num_prompts):
        ids = [rng.randrange(SPECIAL_TOKENS, SHAPE.vocab_size) for _ in range(rng.randrange(8, 17))]
        ids[-1] = ids[-1] // 2 * 2 + (rng.random() < LONG_FRACTION)
        rows.append({"prompt": "".join(chr(FIRST_CHARACTER + i - SPECIAL_TOKENS) for i in ids), "answer": ""})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
