"""Rules of the section `optimizer`."""

from __future__ import annotations

from grpo_mega.config.schema import Config
from grpo_mega.types import UserError


def check_optimizer(config: Config) -> None:
    """Raise UserError for the first broken rule."""
    for rule in (_warmup, _unused_keys, _minimum, _decay_end, _muon, _moments):
        rule(config)


def _warmup(config: Config) -> None:
    fraction, updates = config.optimizer.warmup_fraction, config.train.num_updates
    if fraction is None:
        return
    if config.optimizer.warmup_updates > 0:
        raise UserError(
            f"optimizer.warmup_updates={config.optimizer.warmup_updates} and optimizer.warmup_fraction={fraction} are "
            "two lengths of one warm-up",
            remedy="remove one of them",
        )
    if config.optimizer.warmup_of(updates) == 0:
        raise UserError(
            f"optimizer.warmup_fraction={fraction} of {updates} updates is less than one update: there is no warm-up",
            remedy="raise it, or remove optimizer.warmup_fraction",
        )


def _unused_keys(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.shape != "constant":
        return
    if optimizer.decay_updates is not None:
        raise UserError(
            f"optimizer.decay_updates={optimizer.decay_updates} does nothing with optimizer.schedule=constant",
            remedy="set optimizer.schedule=linear or cosine, or remove optimizer.decay_updates",
        )
    if optimizer.min_lr > 0:
        raise UserError(
            f"optimizer.min_lr={optimizer.min_lr} does nothing without optimizer.decay_updates or optimizer.schedule: "
            "the learning rate does not decay",
            remedy="set optimizer.schedule=linear or cosine, or remove optimizer.min_lr",
        )


def _minimum(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        raise UserError(
            f"optimizer.min_lr={optimizer.min_lr} must be at most optimizer.lr={optimizer.lr}",
            remedy="lower optimizer.min_lr",
        )


def _decay_end(config: Config) -> None:
    optimizer, updates = config.optimizer, config.train.num_updates
    if optimizer.shape == "constant":
        return
    warmup, decay_end = optimizer.warmup_of(updates), optimizer.decay_end_of(updates)
    given = optimizer.decay_updates is not None
    end = f"optimizer.decay_updates={decay_end}" if given else f"the number of updates, {updates},"
    if decay_end <= warmup:
        raise UserError(
            f"{end} must be more than the warm-up of {warmup} updates: it counts from the first update",
            remedy=f"use {warmup + 1} or more" if given else "shorten the warm-up, or raise train.steps",
        )
    if updates > decay_end and optimizer.min_lr == 0:
        raise UserError(
            f"{end} gives the last {updates - decay_end} of {updates} updates a learning rate of 0",
            remedy="raise optimizer.decay_updates, or set optimizer.min_lr",
        )


def _muon(config: Config) -> None:
    optimizer, precision = config.optimizer, config.precision
    if optimizer.name != "muon":
        if optimizer.muon_momentum is not None:
            raise UserError(
                f"optimizer.muon_momentum={optimizer.muon_momentum} does nothing with optimizer.name={optimizer.name}",
                remedy="set optimizer.name=muon, or remove optimizer.muon_momentum",
            )
        return
    if optimizer.host_fraction > 0:
        raise UserError(
            f"optimizer.host_fraction={optimizer.host_fraction} is not supported with optimizer.name=muon, whose "
            "matrix products are too slow on the host",
            remedy="set optimizer.host_fraction=0, or optimizer.name=adam",
        )
    if precision.fp8 is not None and precision.fp8.params:
        raise UserError(
            "precision.fp8.params=true is not supported with optimizer.name=muon, which has not been tried with "
            "weights that are stored in FP8",
            remedy="set precision.fp8.params=false, or optimizer.name=adam",
        )


def _moments(config: Config) -> None:
    optimizer, precision = config.optimizer, config.precision
    if optimizer.moments == "fp32":
        return
    reasons = {
        f"optimizer.name={optimizer.name}": optimizer.name != "adam",
        f"optimizer.host_fraction={optimizer.host_fraction}": optimizer.host_fraction > 0,
        f"precision.dtype={precision.dtype}": precision.dtype != "bf16",
        "precision.fp8": precision.fp8 is not None,
    }
    for key in (key for key, is_set in reasons.items() if is_set):
        raise UserError(
            f"optimizer.moments={optimizer.moments} is not supported with {key}: only Transformer Engine's Adam on the "
            "device, with bf16 weights, stores moments in bf16",
            remedy=f"set optimizer.moments=fp32, or change {key.partition('=')[0]}",
        )
