"""Config section `data`: sets of training and held-out prompts (docs/data.md)."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from grpo_mega.config.hub_names import is_hub_name
from grpo_mega.config.section import Section


class RowFilter(Section):
    """A condition on one value of a row, such as its difficulty level or pass rate.

    Either bounds (`min`, `max` or both) or `any_of` must be set.
    """

    key: str
    """Key of the value; `a.b` is key b of the object a."""
    min: float | None = None
    """Smallest value that is kept. null: no lower bound."""
    max: float | None = None
    """Largest value that is kept. null: no upper bound."""
    any_of: tuple[str | int | float, ...] | None = Field(None, strict=False)
    """Values that are kept. null: use the bounds."""


class DataSource(Section):
    """One set of prompts. Keys that are null take the value of the same key of `data`."""

    path: str
    """JSONL or Parquet file, folder written by the package `datasets`, data set of the Hugging Face hub
    (`openai/gsm8k`), `arithmetic:train` or `arithmetic:heldout`."""
    name: str | None = None
    """Name in metrics and messages. null: the name of the file or folder without its extension."""
    weight: float = Field(1.0, gt=0)
    """Fraction of the training prompts, relative to the other sets. Each set is shuffled and repeated separately."""
    config: str | None = None
    """Configuration of a data set of the hub, for example `main`. null: it has one, or a default."""
    split: str | None = None
    """Split of a folder or of a data set of the hub. null: it holds one."""
    revision: str | None = None
    """Branch, tag or commit of a data set of the hub. null: `main`. The resolved config holds the commit."""
    prompt_key: str | None = None
    """Key of the prompt in a row. null: `data.prompt_key`."""
    answer_key: str | None = None
    """Key of the answer in a row. null: `data.answer_key`."""
    min_prompt_tokens: int | None = Field(None, ge=1)
    """Shortest prompt that is kept, in tokens after the template. null: no lower bound."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Longest prompt that is kept, in tokens after the template. null: only `data.max_prompt_tokens` applies, with
    `data.overlong`."""
    filters: tuple[RowFilter, ...] = Field((), strict=False)
    """Conditions that a row must all meet to be kept."""

    @property
    def label(self) -> str:
        """Return `name`, or the name that is derived from `path`."""
        return self.name or re.sub(r"[^A-Za-z0-9_.-]", "_", PurePath(self.path).stem)

    @property
    def is_on_hub(self) -> bool:
        """Return True if `path` is the name of a data set of the hub."""
        return is_hub_name(self.path)


# The tags appear in the locations of pydantic's errors; load.py removes them.
DataSets = Annotated[
    Annotated[str, Tag("(path)")] | Annotated[tuple[DataSource, ...], Field(strict=False), Tag("(list)")],
    Discriminator(lambda value: "(list)" if isinstance(value, list | tuple) else "(path)"),
]


class DataConfig(Section):
    """Prompts of training and evaluation."""

    train: DataSets
    """Training prompts: a path or a name on the hub (see `data.train[].path`), or a list of sets."""
    eval: DataSets | None = None
    """Held-out prompts: a path or a name on the hub, or a list of sets. null: no evaluation."""
    prompts_per_step: int = Field(32, ge=1)
    """Prompts per step; a step samples `sampling.group_size` rollouts of each."""
    prompt_key: str | None = None
    """Key of the prompt in a row; `a.b` is key b of the object a. null: `prompt`, or `question` if there is no
    `prompt`."""
    answer_key: str | None = None
    """Key of the reference answer in a row. null: `answer`."""
    template: Literal["chat", "plain"] = "chat"
    """`chat`: a chat template. `plain`: the contents of the messages, joined by blank lines."""
    chat_template: str | None = None
    """File with a Jinja chat template, for `template: chat`. null: the template of the model's tokenizer."""
    chat_template_kwargs: dict[str, Any] = Field({})
    """Variables of the chat template, name -> JSON value, for example `enable_thinking: false`."""
    allow_special_tokens: bool = False
    """Encode the text of a special token in a row, such as `<|im_end|>`, as that token. false: as ordinary text."""
    system_prompt: str | None = None
    """System message of every prompt that has none of its own. null: none."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longest prompt of all sets that are sampled from, in tokens after the template."""
    overlong: Literal["error", "skip", "truncate"] = "error"
    """Handling of prompts longer than `max_prompt_tokens`, and of examples longer than `max_example_tokens`: stop with
    an error, or skip them and log their number. `truncate`, for examples only: leave out their last tokens, and log
    their number."""
    messages_key: str | None = None
    """`train.objective: sft`: key of the conversation in a row, a list of messages; `a.b` is key b of the object a.
    null: `messages`, in rows that have it."""
    completion_key: str | None = None
    """`train.objective: sft`: key of the answer in a row with a prompt; `a.b` is key b of the object a. null:
    `completion`."""
    max_example_tokens: int = Field(4096, ge=2)
    """`train.objective: sft`: longest example, in tokens after the template."""

    @property
    def train_sets(self) -> tuple[DataSource, ...]:
        """Return `train` as a list."""
        return (DataSource(path=self.train),) if isinstance(self.train, str) else self.train

    @property
    def eval_sets(self) -> tuple[DataSource, ...]:
        """Return `eval` as a list, which is empty when there is no evaluation."""
        return (DataSource(path=self.eval),) if isinstance(self.eval, str) else self.eval or ()
