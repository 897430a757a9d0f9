"""Fixtures of the parallel tests: a pool of ranks, recorded batches, their oracles, and the results of each layout."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import RankPool
from tests.helpers.recorded_rollouts import (
    DEEP_LAYOUTS,
    LAYOUTS,
    LONG_LAYOUTS,
    ONE,
    VOCAB,
    Layout,
    RankRecord,
    Recorded,
    measure_layout,
    sample_groups,
)
from tests.helpers.tiny_models import make_tiny_model
from tests.helpers.update_oracle import Expected, compute_expected, perturbed_log_probs


@dataclass(frozen=True)
class Tiny:
    """A tiny random model, its sampling temperature, and whether an environment wrote some of the tokens."""

    family: Any
    tied: bool = False
    temperature: float = 1.0
    num_layers: int = 2
    with_results: bool = False


MODELS = {
    "qwen3": Tiny("qwen3"),
    "qwen3-tied": Tiny("qwen3", tied=True),
    "qwen2": Tiny("qwen2", temperature=0.7),
    "llama": Tiny("llama"),
    "deep": Tiny("qwen3", tied=True, num_layers=4, with_results=True),
}
# Layouts of the default tier; the long tier has the others. Qwen2 and Llama differ from Qwen3 in parts of a layer that
# only tensor parallelism splits, and a tied head in the stages that hold it.
_LAYOUTS_OF = {
    "qwen3": LAYOUTS,
    "qwen3-tied": (ONE, Layout(2, tp=2, sequence_parallel=True), Layout(2, pp=2)),
    "qwen2": (ONE, Layout(2, tp=2)),
    "llama": (ONE, Layout(2, tp=2)),
    "deep": DEEP_LAYOUTS,
}
CASES = [(name, layout) for name, layouts in _LAYOUTS_OF.items() for layout in layouts]
_LONG = [
    pytest.param(name, layout, marks=pytest.mark.long)
    for name, layouts in _LAYOUTS_OF.items()
    for layout in (LONG_LAYOUTS if name == "deep" else LAYOUTS)
    if layout not in layouts
]
every_case = pytest.mark.parametrize(("model", "layout"), [*CASES, *_LONG], ids=str)


class Laboratory:
    """Models, oracles and runs; each is made once, on first use."""

    def __init__(self, pool: RankPool, folder: Path) -> None:
        self.pool = pool
        self._folder = folder
        self._recorded: dict[str, Recorded] = {}
        self._expected: dict[str, Expected] = {}
        self._runs: dict[tuple[str, Layout], list[RankRecord]] = {}

    def recorded(self, name: str) -> Recorded:
        """Return the model `name` of MODELS and rollouts for it."""
        if name not in self._recorded:
            tiny, seed = MODELS[name], list(MODELS).index(name)
            temperature, layers = tiny.temperature, tiny.num_layers
            model = make_tiny_model(self._folder / name, tiny.family, tiny.tied, VOCAB, seed, num_hidden_layers=layers)
            _plant_negative_zeros(model)
            groups, rewards = sample_groups(4, 4, seed, with_results=tiny.with_results)
            old = perturbed_log_probs(groups, model, temperature, 0.01, seed + 10)
            ref = perturbed_log_probs(groups, model, temperature, 0.02, seed + 20)
            self._recorded[name] = Recorded(model, groups, rewards, old, ref, temperature)
        return self._recorded[name]

    def expected(self, name: str) -> Expected:
        """Return the results of the oracle."""
        if name not in self._expected:
            self._expected[name] = compute_expected(self.recorded(name))
        return self._expected[name]

    def run(self, name: str, layout: Layout) -> list[RankRecord]:
        """Return the measurements of each rank."""
        if (name, layout) not in self._runs:
            self._runs[name, layout] = self.pool.call(layout.world, measure_layout, self.recorded(name), layout)
        return self._runs[name, layout]


def _plant_negative_zeros(model: Path) -> None:
    """Write -0.0 into every tensor: a copy through arithmetic (x + 0) would lose the sign."""
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    tensors = load_file(path)
    for tensor in tensors.values():
        tensor.view(-1)[[1, -1]] = -0.0
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def laboratory(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(rank_pool, tmp_path_factory.mktemp("laboratory"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MB, which holds one checkpoint and not three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs the rights of root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
