"""The fields of a `config.json`, read one by one; a field that no reader has read is an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo_mega.types import UserError

# Bookkeeping, sampling defaults and losses of pre-training: none changes what the model computes here.
# fmt: off
_HARMLESS = frozenset((
    "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures", "auto_map",
    "aux_loss_alpha", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "ep_size", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "model_type",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_router_logits", "output_scores", "pad_token_id", "prefix", "problem_type",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "router_aux_loss_coef", "sep_token_id", "seq_aux", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
))
# fmt: on


def with_dtype(raw: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return the fields of a config.json with another dtype of the weights, for example `bfloat16`.

    A config that names no dtype still names none: its readers use the dtype of the tensors.
    """
    return raw | {key: dtype for key in ("dtype", "torch_dtype") if key in raw}


MOST = 10_000_000
"""A larger size is that of a damaged file, and would take all memory."""


class Fields:
    """The fields of one config. `take`, `whole`, `number` and `flag` read a field; `only` requires certain values."""

    def __init__(self, raw: dict[str, Any], where: str, architecture: str, family: str) -> None:
        self.where, self.architecture, self.family = where, architecture, family
        self._left = {name: value for name, value in raw.items() if name not in _HARMLESS}

    def take(self, *names: str, default: Any = None) -> Any:
        """Return the value under one of several names; null counts as missing.

        Raises:
            UserError: two of the names have different values.
        """
        found = {name: self._left.pop(name) for name in names if name in self._left}
        values = {name: value for name, value in found.items() if value is not None}
        if not values:
            return default
        (first, value), *others = values.items()
        for name, other in others:
            if other != value:
                raise UserError(
                    f"{self.where}: {first}={value} and {name}={other} contradict each other",
                    remedy="remove one of them",
                )
        return value

    def whole(self, *names: str, default: int | None = None) -> int:
        """Return a whole number; without a default the field is required."""
        value = self._required(names) if default is None else self.take(*names, default=default)
        return int(self._checked(names[0], value, number=int))

    def size(self, *names: str, default: int | None = None) -> int:
        """Return a whole number from 1 to MOST; without a default the field is required."""
        value = self.whole(*names, default=default)
        if not 1 <= value <= MOST:
            raise UserError(
                f"{self.where}: {names[0]}={value} must be between 1 and {MOST}", remedy="download the file again"
            )
        return value

    def maybe_whole(self, *names: str) -> int | None:
        """Return a whole number, or None if the field is missing or null."""
        value = self.take(*names)
        return None if value is None else int(self._checked(names[0], value, number=int))

    def number(self, *names: str, default: float) -> float:
        """Return a real number."""
        return float(self._checked(names[0], self.take(*names, default=default), number=float))

    def items(self, *names: str, kind: type, default: Sequence[Any] | None = None) -> list[Any] | None:
        """Return a list whose items have the type `kind`; None without a default if it is missing or null."""
        value = self.take(*names, default=default)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not all(type(each) is kind for each in value):
            raise UserError(
                f"{self.where}: {names[0]}={_json(value)} must be a list of {kind.__name__}",
                remedy="download the file again",
            )
        return list(value)

    def flag(self, *names: str, default: bool = False) -> bool:
        """Return a boolean."""
        value = self.take(*names, default=default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {names[0]}={value} must be true or false", remedy="download the file again")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Check that the field is missing, null, or one of the allowed values.

        Raises:
            UserError: it has another value.
        """
        value = self._left.pop(name, None)
        if value is not None and value not in allowed:
            self.reject(f"{name}={_json(value)}")

    def unused(self, *names: str) -> None:
        """Drop known fields that repeat what other fields contain."""
        for name in names:
            self._left.pop(name, None)

    def reject(self, what: str) -> None:
        """Raise UserError: this setting is not supported for the family."""
        raise UserError(
            f"{self.where}: {what} is not supported for {self.family}", remedy="use a checkpoint without it"
        )

    def finish(self) -> None:
        """Raise UserError if there is a field that no reader has read."""
        for name in sorted(name for name, value in self._left.items() if value is not None):
            raise UserError(
                f"{self.where}: the field {name} is not known for {self.family} and would be ignored",
                remedy="remove it if it does not change what the model computes",
            )

    def _required(self, names: Sequence[str]) -> Any:
        present = any(name in self._left for name in names)
        value = self.take(*names)
        if value is None and not present:
            raise UserError(
                f"{self.where}: the field '{names[0]}' is missing", remedy=f"a {self.architecture} config has it"
            )
        return value

    def _checked(self, name: str, value: Any, number: type) -> Any:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        try:
            ok = ok and number(value) == value
        except (ValueError, OverflowError):  # not finite, or beyond float
            ok = False
        if not ok:
            raise UserError(f"{self.where}: {name}={_json(value)} must be a number", remedy="download the file again")
        return value


def _json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
