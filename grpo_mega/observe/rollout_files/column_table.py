"""Columns of the rollout files: names, types, encodings and meanings. docs/reference/rollouts.md is made of them.

Floats and token ids are encoded by byte planes (BYTE_STREAM_SPLIT), which zstd compresses well and fast. Texts and
other columns that repeat have a dictionary. A second float32 log-prob of every token would take two fifths of a file,
so the policy's are stored as the rounded difference from the engine's (mismatch_column.py).
Asserted by tests/unit/observe/rollout_files/test_column_table.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

SCHEMA_VERSION = 3
"""Version of the columns, in the metadata of every file. A reader rejects a file of another version."""
VERSION_KEY, NUM_PARTS_KEY, PART_KEY = b"grpo_mega.rollouts", b"grpo_mega.num_parts", b"grpo_mega.part"
EXPERT_SHAPE_KEY = b"grpo_mega.expert_shape"
MISMATCH_BITS = 4
"""Bits of the mantissa of `mismatch` behind the leading one."""
FILE_METADATA = {
    VERSION_KEY: "version of the columns",
    PART_KEY: "index of the part, which is the index of its prompt shard",
    NUM_PARTS_KEY: "number of parts of the step",
    EXPERT_SHAPE_KEY: "`layers,choices`: the number of layers and of chosen experts per token in `expert_choices`",
}

Encoding = Literal["plain", "dictionary", "byte planes"]


@dataclass(frozen=True)
class RolloutColumn:
    """A column of the rollout files, or of the rows that are read from them.

    `per_token`: its values have one entry per token. `where`: a column `in files` is not in the rows that are read, and
    one `in rows` is computed when a file is read.
    """

    name: str
    type: pa.DataType
    meaning: str
    encoding: Encoding = "plain"
    per_token: bool = False
    is_text: bool = False
    where: Literal["in both", "in files", "in rows"] = "in both"

    @property
    def parquet_path(self) -> str:
        """Path of the leaf column in the Parquet file."""
        return f"{self.name}.list.element" if pa.types.is_list(self.type) else self.name


_LOG_PROBS = pa.list_(pa.float32())
_TOKENS = pa.list_(pa.int32())

COLUMNS: tuple[RolloutColumn, ...] = (
    RolloutColumn("step", pa.int32(), "number of the step, from 1"),
    RolloutColumn("group", pa.int32(), "position of the group in the step, from 0"),
    RolloutColumn("member", pa.int32(), "position of the rollout in its group, from 0"),
    RolloutColumn("prompt_index", pa.int64(), "row of the prompt among all rows of the training sets"),
    RolloutColumn("data_set", pa.string(), "name of the prompt's data set", "dictionary"),
    RolloutColumn("prompt", pa.string(), "text of the prompt, after the chat template", "dictionary", is_text=True),
    RolloutColumn("completion", pa.string(), "text of the completion", is_text=True),
    RolloutColumn("answer", pa.string(), "reference answer of the prompt", "dictionary", is_text=True),
    RolloutColumn(
        "reward", pa.float64(), "reward; null for a rollout that could not be scored and was left out of the loss"
    ),
    RolloutColumn("reward_components", pa.map_(pa.string(), pa.float64()), "value of each reward term, by its name"),
    RolloutColumn("reward_failures", pa.list_(pa.string()), "names of the reward terms that failed"),
    RolloutColumn("advantage", pa.float64(), "mean advantage of the rollout's trained tokens"),
    RolloutColumn("stop_reason", pa.string(), "reason why sampling stopped: eos, length or stop", "dictionary"),
    RolloutColumn(
        "policy_version",
        pa.int32(),
        "number of updates behind the weights that sampled the rollout, or its last answer",
    ),
    RolloutColumn("replica", pa.int32(), "index of the engine replica that sampled the rollout"),
    RolloutColumn("num_turns", pa.int32(), "number of turns that the policy took"),
    RolloutColumn("prompt_ids", _TOKENS, "token ids of the prompt", "byte planes", per_token=True),
    RolloutColumn("completion_ids", _TOKENS, "token ids of the completion", "byte planes", per_token=True),
    RolloutColumn(
        "sampler_log_probs",
        _LOG_PROBS,
        "log-prob of each completion token from the engine, nats; 0 for tokens that an environment wrote",
        "byte planes",
        per_token=True,
    ),
    RolloutColumn(
        "mismatch",
        _LOG_PROBS,
        "log-prob of each completion token from the policy before the update minus the one from the engine, nats, "
        f"rounded to {MISMATCH_BITS + 1} significant bits: a relative error of at most 1/{2 ** (MISMATCH_BITS + 1)}, "
        "or an absolute one of 3e-8; null where not computed (`algorithm.old_log_probs=sampler`)",
        "byte planes",
        per_token=True,
        where="in files",
    ),
    RolloutColumn(
        "old_log_probs",
        _LOG_PROBS,
        "log-probs of the policy before the update, nats, as `sampler_log_probs + mismatch`; null where `mismatch` is",
        per_token=True,
        where="in rows",
    ),
    RolloutColumn(
        "loss_mask",
        pa.list_(pa.bool_()),
        "true for completion tokens that the policy sampled, false for tokens of an environment; null: all are true",
        per_token=True,
    ),
    RolloutColumn(
        "policy_versions",
        _TOKENS,
        "number of updates behind the weights that sampled each completion token, -1 for tokens of an environment; "
        "null: `policy_version` for all tokens that the policy sampled",
        "dictionary",
        per_token=True,
    ),
    RolloutColumn(
        "steps",
        pa.list_(pa.struct([("end_token", pa.int32()), ("value", pa.float64())])),
        "steps of a process reward: position of the last token in the completion, and value; null without one",
    ),
    RolloutColumn(
        "expert_choices",
        pa.list_(pa.int16()),
        "with `algorithm.routing_replay`: experts of the first N tokens of prompt and completion, [N, layers, choices] "
        "in row-major order, -1 where nothing was recorded",
        "byte planes",
    ),
)
COLUMN_BY_NAME = {column.name: column for column in COLUMNS}
SCHEMA = pa.schema([pa.field(column.name, column.type) for column in COLUMNS if column.where != "in files"])
"""Columns of the rows in memory: those that are written, and those that are read."""
FILE_SCHEMA = pa.schema([pa.field(column.name, column.type) for column in COLUMNS if column.where != "in rows"])

_HEAD = f"""# Rollout files reference

Generated by `tools/dev/make_rollouts_reference.py` from `grpo_mega/observe/rollout_files/column_table.py`. Do not edit.

`rollouts/step_000012/part-00003.parquet` in the run folder has one row per rollout that prompt shard 3 sampled in step
12: one prompt shard per engine replica, or per data-parallel rank of a replica. Rows are in the order of `group` and
`member`. `observe.rollouts` selects which groups are written. A part is whole or not there, and all parts of a step are
on disk before the checkpoint of the step is visible. `grpo-mega rollouts RUN_DIR --step 12` prints them, and with
`--jsonl` as one JSON object per line; any reader of Parquet reads them.

The files are compressed with zstd and have checksums. Texts are UTF-8; a code unit that UTF-8 cannot encode (a lone
surrogate) is written as `\\ud800`. The version of the columns is {SCHEMA_VERSION}.

| column | type | meaning |
|---|---|---|
"""
_ROWS_HEAD = """
The rows that `grpo-mega rollouts` prints have these columns without `mismatch`, and in its place:

| column | type | meaning |
|---|---|---|
"""
_METADATA_HEAD = """
Metadata of every file:

| key | value |
|---|---|
"""


def reference() -> str:
    """Return the text of docs/reference/rollouts.md."""
    lines = {c.name: f"| `{c.name}` | {_type_name(c.type)} | {c.meaning} |\n" for c in COLUMNS}
    of_files = "".join(lines[name] for name in FILE_SCHEMA.names)
    of_rows = _ROWS_HEAD + "".join(lines[c.name] for c in COLUMNS if c.where == "in rows")
    keys = [f"| `{key.decode()}` | {meaning} |\n" for key, meaning in FILE_METADATA.items()]
    return _HEAD + of_files + of_rows + _METADATA_HEAD + "".join(keys)


def _type_name(of_type: pa.DataType) -> str:
    """Return the name of a type with the number of bits of a float, and without the names of list entries."""
    if pa.types.is_map(of_type):
        return f"map<{_type_name(of_type.key_type)}, {_type_name(of_type.item_type)}>"
    if pa.types.is_list(of_type):
        return f"list<{_type_name(of_type.value_type)}>"
    if pa.types.is_struct(of_type):
        return f"struct<{', '.join(f'{field.name}: {_type_name(field.type)}' for field in of_type)}>"
    return {"float": "float32", "double": "float64"}.get(str(of_type), str(of_type))
