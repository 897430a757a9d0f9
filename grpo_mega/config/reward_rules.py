"""Rules for `reward.terms[].datasets`: every name is a set of the run, and every set has a term."""

from __future__ import annotations

import difflib

from grpo_mega.config.schema import Config
from grpo_mega.types import UserError


def check_reward_sets(config: Config) -> None:
    """Raise UserError for the first broken rule."""
    sets = {
        source.label: f"data.{key}[{position}]"
        for key, sources in (
            ("train", () if config.is_sft else config.data.train_sets),
            ("eval", config.data.eval_sets),
        )
        for position, source in enumerate(sources)
    }
    for position, term in enumerate(config.reward.terms):
        where = f"reward.terms[{position}].datasets"
        if term.datasets == ():
            raise UserError(f"{where}=[] must list at least one set", remedy=f"remove {where}, or add a set")
        for name in term.datasets or ():
            if name not in sets:
                nearest = difflib.get_close_matches(name, sets, n=1, cutoff=0.0)[0]
                raise UserError(
                    f"{where}: {name!r} is not a set of data.train or data.eval, did you mean {nearest!r}?",
                    remedy=f"use names of {', '.join(sets)}",
                )
    for name, where in sets.items():
        if not any(term.datasets is None or name in term.datasets for term in config.reward.terms):
            raise UserError(
                f"{where}.name={name!r} has no reward: every entry of reward.terms lists other sets in datasets",
                remedy=f"add {name} to the datasets of a term, or a term without datasets",
            )
