"""The head of a checkpoint whose config.json ties it to the embedding, although its files hold `lm_head.weight`.

Fine-tuning tools leave an exact copy of the embedding, or a head of its own with a config.json that was not changed.
transformers 5 (`PreTrainedModel.tie_weights`) and vLLM 0.32 (`maybe_retie_word_embeddings`) tie the two only if they
are equal, and so does this program. Every reader of a model folder uses `checkpoint_spec`, so that policy, engines,
converters and export agree. Asserted by tests/unit/formats/test_stored_head.py and tests/engine/test_weight_sync.py.
"""

from __future__ import annotations

import functools
import json
import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from grpo_mega.formats.safetensors_headers import INDEX, SINGLE
from grpo_mega.formats.safetensors_reader import HfFiles
from grpo_mega.models.config_readers import read_spec
from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import TensorSlice

_log = logging.getLogger(__name__)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
StoredHead = Literal["none", "copy", "different"]
"""`none`: the files hold no head, or no embedding. `copy`: it equals the embedding. `different`: it does not."""
_ELEMENTS_AT_ONCE = 1 << 24


def checkpoint_spec(folder: Path) -> ModelSpec:
    """Read the spec of a model folder; a head that differs from the embedding is not tied, whatever config.json says.

    Args:
        folder: with config.json. Without safetensors files config.json alone decides.

    Raises:
        UserError: config.json is missing, malformed or not supported, or the files of a tied model are damaged.
    """
    spec = read_spec(folder)
    if spec.tie_embeddings and stored_head(folder) == "different":
        _warn_of_head(folder)
        return replace(spec, tie_embeddings=False)
    return spec


@functools.cache
def _warn_of_head(folder: Path) -> None:
    """Log once per process and folder that the model is not tied."""
    _log.warning(
        "%s: config.json has tie_word_embeddings=true, but %s differs from the embedding and is used as it is",
        folder,
        HEAD,
    )


def stored_head(folder: Path) -> StoredHead:
    """Compare `lm_head.weight` of the files with their embedding, as `torch.equal` on float32 values does.

    The result is computed once per content of the folder: an exact copy is read completely.
    """
    files = sorted(folder.glob("*.safetensors*"))
    stamps = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return _stored_head(folder, stamps)


@functools.lru_cache(maxsize=16)
def _stored_head(folder: Path, _stamps: tuple[tuple[str, int, int], ...]) -> StoredHead:
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        return "none"
    with closing(HfFiles(folder)) as files:
        if HEAD not in files.shapes or EMBEDDING not in files.shapes:
            return "none"
        shape = files.shapes[EMBEDDING]
        if files.shapes[HEAD] != shape:
            return "different"
        rows, columns = shape
        step = max(1, _ELEMENTS_AT_ONCE // max(1, columns))
        for row in range(0, rows, step):
            offsets, part = (row, 0), (min(step, rows - row), columns)
            head, embedding = (files.read(TensorSlice(name, offsets, part)).float() for name in (HEAD, EMBEDDING))
            if not torch.equal(head, embedding):
                return "different"
    return "copy"


def untie_config(path: Path) -> None:
    """Set `tie_word_embeddings` of a config.json to false, if it is true.

    Older programs, transformers 4 among them, would otherwise drop the head that is stored beside it.
    """
    raw = json.loads(path.read_text())
    if raw.get("tie_word_embeddings"):
        path.write_text(json.dumps(raw | {"tie_word_embeddings": False}, indent=2))
