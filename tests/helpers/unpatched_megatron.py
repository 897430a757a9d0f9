"""The installed Megatron-Core without patches: single modules, and training on ranks with one patch undone."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.helpers.checkpointed_training import resume_training, run_with_checkpoint
from tests.helpers.family_updates import FamilyRecord, measure_family
from tests.helpers.recorded_rollouts import Layout, Recorded


def unpatched(name: str) -> ModuleType:
    """Execute a module of the installed Megatron-Core again, as a module of its own without patches."""
    spec = importlib.util.find_spec(f"megatron.core.{name}")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def without_patch(patch: str) -> Iterator[None]:
    """Undo one patch of megatron_patches/fixes.py in this process inside the block."""
    from grpo_mega.policy.megatron_patches import fixes

    fixes.install()
    undone: dict[str, Callable[[], Any]] = {
        "pipeline messages": lambda: _attribute(fixes, "PIPELINE_MESSAGES", {}),
        "norms of latent vectors": lambda: _attribute(fixes, "keep_after_build", lambda config: None),
        "shared rotary key": lambda: _attribute(fixes, "mark_shared_keys", lambda model: None),
        "step of each parameter": lambda: _original(fixes.DistributedOptimizer, "_set_main_param_and_optimizer_states"),
    }
    with undone[patch](), _attribute(fixes, "install", lambda: None):
        yield


def _original(owner: Any, name: str) -> Any:
    return _attribute(owner, name, inspect.unwrap(getattr(owner, name)))


def measure_family_without(rank: int, patch: str, recorded: Recorded, layout: Layout) -> FamilyRecord:
    with without_patch(patch):
        return measure_family(rank, recorded, layout)


def resume_without(rank: int, patch: str, recorded: Recorded, layout: Layout, folder: Path) -> tuple[Any, Any] | str:
    """Return the optimizer state of the uninterrupted and of the resumed run, or the error of the resumed run."""
    with without_patch(patch):
        _, state = run_with_checkpoint(rank, recorded, layout, folder)
        (checkpoint,) = (path for path in folder.iterdir() if path.is_dir())
        try:
            _, _, resumed = resume_training(rank, recorded, layout, checkpoint)
        except KeyError as error:
            return str(error)
    return state, resumed
