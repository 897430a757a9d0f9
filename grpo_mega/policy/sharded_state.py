"""Saves and loads weights and optimizer state in Megatron's distributed checkpoint format, for any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from grpo_mega.policy.build import MegatronParts
from grpo_mega.policy.megatron_patches import checkpoint_reading, cpu, fixes
from grpo_mega.policy.state_records import state_records
from grpo_mega.types import TensorRecord

from megatron.core import dist_checkpointing, parallel_state  # isort: skip - after policy.build prepares the import
from megatron.core.dist_checkpointing.serialization import (  # isort: skip
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (  # isort: skip
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)

# keys that loading an optimizer state overwrites, but that come from the config and not from the checkpoint
_FROM_CONFIG = ("lr", "max_lr", "min_lr", "weight_decay", "betas", "eps")


def save_weights(parts: MegatronParts, folder: Path, vocab_size: int, *, is_first: bool) -> dict[str, TensorRecord]:
    """Save only the parameters, into a folder that the first rank creates; return their records. Collective."""
    cpu.install()
    if is_first:
        folder.mkdir()
    torch.distributed.barrier()
    strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), _dp_group(), False)
    weights = _sharded_weights(parts)
    records = state_records(weights, vocab_size)
    dist_checkpointing.save({"model": weights}, str(folder), sharded_strategy=strategy)
    return records


def load_weights(parts: MegatronParts, folder: Path) -> None:
    """Load the parameters that `save_weights` saved, in any layout; the optimizer is unchanged. Collective."""
    cpu.install()
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), _dp_group())
    with checkpoint_reading.loading(folder):
        state = dist_checkpointing.load({"model": _sharded_weights(parts)}, str(folder), sharded_strategy=strategy)
    _fill_models(parts, state["model"])


def save_state(parts: MegatronParts, folder: Path, extra: dict[str, Any], vocab_size: int) -> dict[str, TensorRecord]:
    """Save weights, optimizer state and `extra`, plain values that are equal on every rank. Collective.

    Return the records of the live tensors, which are computed before anything is written.
    """
    cpu.install()
    state = _sharded_state(parts, is_loading=False) | {"extra": extra}
    records = state_records(state, vocab_size)
    strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), _dp_group(), False)
    dist_checkpointing.save(state, str(folder), sharded_strategy=strategy)
    return records


def live_records(parts: MegatronParts, vocab_size: int, *, with_optimizer: bool) -> dict[str, TensorRecord]:
    """Return the records of the weights and, if asked for, of the optimizer state. Collective."""
    cpu.install()
    return state_records(
        _sharded_state(parts, is_loading=False) if with_optimizer else _sharded_weights(parts), vocab_size
    )


def load_state(parts: MegatronParts, folder: Path) -> dict[str, Any]:
    """Load what `save_state` saved, in any layout, and return `extra`. Collective."""
    cpu.install()
    groups = [{k: g[k] for k in _FROM_CONFIG if k in g} for g in parts.optimizer.param_groups]
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), _dp_group())
    sharded = _sharded_state(parts, is_loading=True)
    with checkpoint_reading.loading(folder):
        state = dist_checkpointing.load(sharded, str(folder), sharded_strategy=strategy)
    _fill_models(parts, state["model"])
    _adopt_rates(parts.optimizer, state["optimizer"])
    with torch.no_grad():
        parts.optimizer.load_state_dict(state["optimizer"])
    for group, values in zip(parts.optimizer.param_groups, groups, strict=True):
        group.update(values)
    extra: dict[str, Any] = state["extra"]
    return extra


def _adopt_rates(optimizer: Any, state: dict[Any, Any]) -> None:
    """Give the loaded groups of parameters the learning rates of the config, which may differ from those of the save.

    distrib_optimizer.py:938 finds the saved group of each present group by values that include these rates.
    """
    present = optimizer.param_groups[0]
    for part in [state] if "optimizer" in state else state.values():
        for group in part["optimizer"]["param_groups"]:
            group.update({key: present[key] for key in ("max_lr", "min_lr") if key in group and key in present})


def _sharded_weights(parts: MegatronParts) -> dict[int, Any]:
    """Return the sharded tensors of each model chunk."""
    model = {}
    for chunk, module in enumerate(parts.models):
        tensors = module.sharded_state_dict(metadata=_metadata())
        # the extra state of Transformer Engine's modules is pickled and not needed
        model[chunk] = {name: value for name, value in tensors.items() if not name.endswith("_extra_state")}
    return model


def _fill_models(parts: MegatronParts, states: dict[int, Any]) -> None:
    for chunk, model in enumerate(parts.models):
        model.load_state_dict(states[chunk], strict=False)


def _sharded_state(parts: MegatronParts, *, is_loading: bool) -> dict[str, Any]:
    model = _sharded_weights(parts)
    with fixes.placeholder_steps(parts.optimizer):
        optimizer = parts.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_metadata())
    return {"model": model, "optimizer": optimizer}


def _metadata() -> dict[str, Any]:
    return {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": _dp_group()}


def _dp_group() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
