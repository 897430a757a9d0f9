"""Rules of Muon and of the number format of Adam's moments: each message names the key, the value and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.config.load import load_config
from grpo_mega.types import UserError
from tests.helpers.error_messages import assert_names

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.muon_momentum=0.9"],
         ["optimizer.muon_momentum=0.9", "optimizer.name=adam", "optimizer.name=muon"]),
        (["optimizer.name=muon", "optimizer.host_fraction=0.5"],
         ["optimizer.host_fraction=0.5", "optimizer.name=muon", "optimizer.host_fraction=0"]),
        (["optimizer.name=muon", "precision.dtype=bf16", "algorithm.kl_coef=0",
          "precision.fp8={recipe: blockwise, params: true}"],
         ["precision.fp8.params=true", "optimizer.name=muon", "precision.fp8.params=false"]),
        (["optimizer.name=lion"], ["optimizer.name='lion'", "adam", "muon"]),
        (["optimizer.moments=bf16", "precision.dtype=fp32"],
         ["optimizer.moments=bf16", "precision.dtype=fp32", "optimizer.moments=fp32"]),
        (["optimizer.moments=bf16", "precision.dtype=bf16", "optimizer.name=muon"],
         ["optimizer.moments=bf16", "optimizer.name=muon", "change optimizer.name"]),
        (["optimizer.moments=bf16", "precision.dtype=bf16", "optimizer.host_fraction=1"],
         ["optimizer.moments=bf16", "optimizer.host_fraction=1.0", "change optimizer.host_fraction"]),
        (["optimizer.moments=bf16", "precision.dtype=bf16", "precision.fp8={recipe: delayed}"],
         ["optimizer.moments=bf16", "precision.fp8", "change precision.fp8"]),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_an_error_that_says_what_to_do(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(QUICKSTART, overrides)
    assert_names(error.value, *words)


def test_muon_and_bf16_moments_load_where_they_are_supported() -> None:
    muon = load_config(QUICKSTART, ["optimizer.name=muon", "optimizer.muon_momentum=0.9", "parallel.tp=2"]).optimizer
    assert (muon.name, muon.momentum_of_muon) == ("muon", 0.9)
    assert load_config(QUICKSTART, ["optimizer.name=muon"]).optimizer.momentum_of_muon == 0.95
    assert load_config(QUICKSTART, ["precision.dtype=bf16", "optimizer.moments=bf16"]).optimizer.moments == "bf16"
