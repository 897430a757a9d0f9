"""One rank of `grpo-mega compare logits`: compares logits and log-probs of sequences with those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from grpo_mega.config.schema import Config
from grpo_mega.data.pack import pack
from grpo_mega.data.rollout_tokens import RolloutTokens
from grpo_mega.data.row_plan import RowShape
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.policy.policy import MegatronPolicy
from grpo_mega.types import Completion, Microbatch, Prompt, Reward, Rollout


def make_rows(sequences: list[list[int]], config: Config) -> list[Microbatch]:
    """Return rows with every sequence once: two rows, or as many as the pipeline schedule needs."""
    shape = RowShape.of(config.parallel, config.precision)
    count = -(-2 // shape.microbatch_multiple) * shape.microbatch_multiple
    bins = [list(range(i, len(sequences), count)) for i in range(count)]
    longest = max(sum(shape.padded(len(sequences[i])) for i in ids) for ids in bins)
    row_tokens = -(-(longest + 1) // shape.row_multiple) * shape.row_multiple  # with some padding
    rows = []
    for ids in bins:
        rollouts = []
        for i in ids:
            tokens = sequences[i][1:]
            completion = Completion(tokens, np.zeros(len(tokens)), "length", 0, "")
            rollouts.append((i, Rollout(Prompt(i, "", (sequences[i][0],), ""), completion, Reward(0.0), 0)))
        packed = RolloutTokens.of(rollouts)
        rows.append(
            pack(
                packed,
                row_tokens=row_tokens,
                advantages=np.zeros(int(packed.loss_counts.sum())),
                token_weights=np.zeros(len(packed)),
                pad_id=0,
                segment_multiple=shape.segment_multiple,
            )
        )
    return rows


def measure(job: dict[str, Any], config: Config, ranks: Ranks) -> None:
    """Compute the rows, the same on every data-parallel rank; one rank of the last stage writes the differences."""
    folder = Path(job["model"])
    policy = MegatronPolicy(config, checkpoint_spec(folder), folder, ranks, with_reference=False)
    rows = make_rows(job["sequences"], config)
    logits, log_probs = policy.logits(rows), policy.log_probs(rows)
    if logits is None or log_probs is None or ranks.rank != ranks.topology.loss_rank(0):
        return
    logit_diff = log_prob_diff = 0.0
    with safe_open(job["expected"], framework="pt") as expected:
        for row, found, values in zip(rows, logits, log_probs, strict=True):
            for i, begin in zip(row.rollout_ids, row.cu_seqlens.tolist(), strict=False):
                wanted = expected.get_tensor(str(i))  # [T, V]
                tokens = torch.tensor(job["sequences"][i][1:])
                end = begin + len(tokens)
                logit_diff = max(logit_diff, float((found[begin : end + 1].cpu() - wanted).abs().max()))
                chosen = torch.log_softmax(wanted[:-1], -1).gather(1, tokens[:, None])[:, 0]
                log_prob_diff = max(log_prob_diff, float((values[begin:end].cpu() - chosen).abs().max()))
    answer = {"max_abs_logit_diff": logit_diff, "max_abs_log_prob_diff": log_prob_diff}
    Path(job["answer"]).write_text(json.dumps(answer))
