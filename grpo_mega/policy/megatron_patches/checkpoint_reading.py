"""Replaces the unrestricted unpickling in Megatron-Core's loader of checkpoints, on every machine.

- strategies/torch.py:793 reads `.metadata` and objects through torch's `FileSystemReader`.
- strategies/common.py:48 reads `common.pt`, which Megatron-Core before 0.19 wrote; torch's environment variable
  TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD would make that call unpickle anything.

Asserted by tests/parallel/test_hostile_checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from grpo_mega.formats.allowed_pickles import load_values
from grpo_mega.formats.safe_storage_reader import SafeStorageReader
from grpo_mega.policy.megatron_patches import cpu
from grpo_mega.types import UserError

cpu.prepare_import()

from megatron.core.dist_checkpointing import serialization  # noqa: E402 - only after prepare_import
from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402
from megatron.core.dist_checkpointing.strategies import common  # noqa: E402
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies  # noqa: E402


def install() -> None:
    """Apply the patch. Idempotent."""
    torch_strategies.FileSystemReader = SafeStorageReader
    common.load_common = serialization.load_common = _load_common


def _load_common(checkpoint_dir: str) -> Any:
    path = Path(checkpoint_dir) / common.COMMON_STATE_FNAME
    return load_values(path.read_bytes(), path)


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Turn errors of Megatron and torch about the content of a checkpoint into errors that name it.

    Raises:
        UserError: `.metadata` cannot be read, a shard cannot be read, or the checkpoint is of another model.
    """
    SafeStorageReader(folder).read_metadata()  # torch would report its error as two tracebacks of missing metadata
    try:
        yield
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        raise failure if isinstance(failure, UserError) else _not_loaded(folder, failure) from error
    except (CheckpointingException, KeyError) as error:
        raise _not_loaded(folder, error) from error


def _not_loaded(folder: Path, error: BaseException) -> UserError:
    reason = " ".join(str(error.args[0] if error.args else error).partition("\n")[0].split())
    return UserError(
        f"{folder}: does not match the model of this run ({reason})",
        remedy="use a checkpoint of the same model, or start from `model.path`",
    )
