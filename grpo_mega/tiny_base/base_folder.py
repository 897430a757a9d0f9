"""The folder of a tiny base model: trained once by supervised fine-tuning, and kept under the digest of its recipe.

Invariants (tests/unit/tiny_base/test_base_folder.py): the same recipe gives the same bytes for any number of threads of
the caller; of several processes one trains and the others wait; a folder that exists is complete.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_mega.config.model_sections import BaseConfig
from grpo_mega.config.schema import Config
from grpo_mega.tiny_base.recipe import examples_of, recipe_digest, save_untrained
from grpo_mega.tiny_base.sft_run import train_base

log = logging.getLogger("grpo_mega.tiny_base")

LOCK_TIMEOUT_SECONDS = 900.0


def model_folder_of(config: Config) -> Path:
    """Return the folder of `model.path` or `model.base`. A base whose weights the run needs is trained if it is new.

    Raises:
        UserError, RuntimeError: see `ensure_base`.
    """
    if config.model.base is None:
        return config.model.folder
    if not config.model.needs_weights:
        return ensure_untrained(config.model.base)
    return ensure_base(config.model.base, config.data.train_sets[0].path)


def ensure_base(recipe: BaseConfig, train_file: str) -> Path:
    """Return the Hugging Face folder of the pre-trained base; train it first if `recipe.cache_dir` does not contain it.

    Every rank may call this: one process per machine trains, and the others wait.

    Args:
        recipe: task, architecture and schedule of the base.
        train_file: `data.train`, the examples of a gsm8k base whose recipe names no file.

    Raises:
        UserError: the examples cannot be read, are longer than the model's positions, or cannot be encoded.
        RuntimeError: the training failed, or another process held the lock for longer than the time limit.
    """
    # The examples are read first, so that a missing file is reported before any folder is created.
    draw = examples_of(recipe, Path(recipe.examples or train_file))
    name = f"{recipe.task}-{recipe_digest(recipe, train_file)[:16]}"
    return _ensure(Path(recipe.cache_dir) / name, lambda work: train_base(recipe, draw, work))


def ensure_untrained(recipe: BaseConfig) -> Path:
    """Return a folder with config.json and tokenizer of a base, without weights; write it if it does not exist.

    Raises:
        RuntimeError: another process held the lock for longer than the time limit.
    """

    def write(work: Path) -> Path:
        save_untrained(recipe, work)
        return work

    return _ensure(Path(recipe.cache_dir) / f"untrained-{recipe_digest(recipe, os.devnull)[:16]}", write)


def _ensure(folder: Path, make: Callable[[Path], Path]) -> Path:
    """Return `folder`; if it does not exist, `make` makes it in a temporary folder, in one process per machine."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive_lock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            for stale in folder.parent.glob(f"{folder.name}.*.tmp"):  # of a process that was killed, or has failed
                shutil.rmtree(stale, ignore_errors=True)
            work = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
            make(work.absolute()).rename(folder)
            shutil.rmtree(work, ignore_errors=True)
    return folder


@contextmanager
def _exclusive_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`, which the system releases when the process exits."""
    with path.open("w") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    log.info("another process pre-trains the base model; waiting for it (%s)", path)
                waiting = True
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{path} has been locked by another process for {LOCK_TIMEOUT_SECONDS:.0f} s; end that process"
                )
            time.sleep(0.2)
        yield
