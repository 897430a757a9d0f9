"""Reward `reward_model`: the output of a frozen Hugging Face sequence classifier with one label.

The model stays in host memory and is on the rank's GPU only while it scores, in the reward phase. Without a GPU it runs
on the CPU. Its values do not depend on the batch size, except for rounding. To have an engine serve the model instead,
use `remote` with protocol `classify`.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_mega.rewards.base import batched_reward
from grpo_mega.rewards.batched import BatchScorer, ScoringRow
from grpo_mega.types import UserError

DTYPES = ("float32", "bfloat16", "float16")
_MAX_TEXT_CHARACTERS = 1_000_000  # a longer completion loses its beginning before it is tokenized


def check_reward_model_args(
    path: str,
    bound: float | None = None,
    chat: bool = False,
    batch_size: int = 8,
    max_tokens: int = 4096,
    dtype: str = "float32",
) -> None:
    """Check the arguments of `reward_model`.

    Raises:
        UserError: the folder does not hold a classifier with one label, or an argument is out of range.
    """
    folder = Path(str(path))
    try:
        model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"path={path!r}: config.json cannot be read ({error})", remedy="give a Hugging Face model folder"
        ) from error
    architectures = model.get("architectures") or []
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        raise UserError(
            f"path={path!r} holds {architectures}; a reward model must be a ...ForSequenceClassification",
            remedy="give another folder",
        )
    labels = len(model.get("id2label") or ("LABEL_0", "LABEL_1"))
    if labels != 1:
        raise UserError(
            f"path={path!r} has {labels} labels; a reward model must have one", remedy="give another folder"
        )
    if bound is not None and (type(bound) not in (int, float) or not 0 < bound < math.inf):
        raise UserError(f"bound={bound!r} must be a finite number above 0", remedy="remove it to use the sigmoid")
    if not isinstance(chat, bool):
        raise UserError(f"chat={chat!r} must be true or false", remedy="use one of them")
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if type(value) is not int or value < 1:
            raise UserError(f"{name}={value!r} must be a whole number above 0", remedy="correct it")
    longest = model.get("max_position_embeddings")
    if longest is not None and max_tokens > longest:
        raise UserError(
            f"max_tokens={max_tokens} must be at most {longest}, the positions of {path!r}", remedy="lower it"
        )
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown", remedy=f"use one of {', '.join(DTYPES)}")


def declared_range(bound: float | None = None, **_: object) -> tuple[float, float]:
    """Return the range: [0, 1] for the sigmoid, else [-bound, bound]."""
    return (0.0, 1.0) if bound is None else (-bound, bound)


def inputs_read(**_: object) -> tuple[str, ...]:
    """Return the inputs that the model gets."""
    return "prompt", "completion", "messages"


@batched_reward(low=0.0, high=1.0, check_args=check_reward_model_args, range_of=declared_range, inputs_of=inputs_read)
def reward_model(
    path: str,
    bound: float | None = None,
    chat: bool = False,
    batch_size: int = 8,
    max_tokens: int = 4096,
    dtype: str = "float32",
) -> BatchScorer:
    """Return sigmoid(logit), or the logit clamped to [-bound, bound].

    Args:
        path: Hugging Face folder with the model and its tokenizer.
        bound: range of the logit; default: use the sigmoid instead.
        chat: apply the model's own chat template to the messages of the prompt and the completion as the assistant's
            answer. false: concatenate the prompt as the policy got it, after the policy's template, and the completion.
        batch_size: completions per forward pass.
        max_tokens: limit of prompt and completion together; a longer text loses its beginning.
        dtype: of the weights and the computation.
    """
    return _ModelScorer(path, bound, chat, batch_size, max_tokens, dtype)


class _ModelScorer:
    def __init__(
        self, path: str, bound: float | None, chat: bool, batch_size: int, max_tokens: int, dtype: str
    ) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._bound, self._chat, self._batch_size, self._max_tokens = bound, chat, batch_size, max_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._model: Any = AutoModelForSequenceClassification.from_pretrained(path, dtype=getattr(torch, dtype))
        self._model.eval().requires_grad_(False)
        known = (self._tokenizer.pad_token_id, self._model.config.pad_token_id, self._tokenizer.eos_token_id, 0)
        self._pad_id = next(number for number in known if number is not None)
        self._model.config.pad_token_id = self._pad_id  # the model finds the last token of a row by it
        self._rows: list[tuple[int, ScoringRow]] = []

    def submit(self, key: int, row: ScoringRow) -> None:
        self._rows.append((key, row))

    def collect(self) -> dict[int, float | Exception]:
        """Score all rows, the longest first, so that an out-of-memory error occurs in the first batch."""
        import torch

        rows, self._rows = self._rows, []
        tokens = [(key, self._token_ids(row)) for key, row in rows]
        tokens.sort(key=lambda item: -len(item[1]))
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        values: dict[int, float | Exception] = {}
        self._model.to(device)
        try:
            with torch.inference_mode():
                for start in range(0, len(tokens), self._batch_size):
                    batch = tokens[start : start + self._batch_size]
                    logits = self._logits([ids for _, ids in batch], device)
                    values.update((key, self._value(logit)) for (key, _), logit in zip(batch, logits, strict=True))
        finally:
            self._model.to("cpu")
        return values

    def close(self) -> None:
        self._rows = []

    def _token_ids(self, row: ScoringRow) -> list[int]:
        completion = row.completion[-_MAX_TEXT_CHARACTERS:].encode("utf-8", "replace").decode("utf-8")
        if self._chat:
            turns = replace(row, completion=completion).conversation
            text = str(self._tokenizer.apply_chat_template(turns, tokenize=False))
        else:
            text = row.prompt + completion
        ids: list[int] = self._tokenizer(text, add_special_tokens=not self._chat)["input_ids"]
        return ids[-self._max_tokens :] or [self._pad_id]

    def _logits(self, batch: list[list[int]], device: Any) -> list[float]:
        import torch

        width = max(len(ids) for ids in batch)
        token_ids = torch.full((len(batch), width), self._pad_id)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for index, ids in enumerate(batch):
            token_ids[index, : len(ids)] = torch.tensor(ids)
            mask[index, : len(ids)] = 1
        output = self._model(input_ids=token_ids.to(device), attention_mask=mask.to(device))
        return [float(logit) for logit in output.logits[:, 0].float().cpu()]

    def _value(self, logit: float) -> float | Exception:
        if not math.isfinite(logit):
            return ValueError(f"the model returned {logit}, not a finite number")
        if self._bound is not None:
            return min(self._bound, max(-self._bound, logit))
        return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else 1.0 - 1.0 / (1.0 + math.exp(logit))
