"""Options and fixtures for all tests: folders of real data, scheduling on workers, and skips without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gsm8k-dir",
        type=Path,
        default=None,
        help="folder with GSM8K's train.jsonl and test.jsonl (default: data/gsm8k, else ../shared/data/gsm8k)",
    )
    parser.addoption(
        "--math-dir",
        type=Path,
        default=None,
        help="folder with college_math_300.jsonl (default: data/math, else ../shared/data/math)",
    )
    parser.addoption(
        "--cases-dir",
        type=Path,
        default=None,
        help="folder with the labeled inputs math.jsonl (default: data/cases, else ../shared/cases)",
    )


@pytest.fixture(scope="session")
def gsm8k_dir(pytestconfig: pytest.Config) -> Path:
    """Return the folder with GSM8K's train.jsonl; skip if there is none, fail if a named folder lacks it."""
    return _data_folder(pytestconfig, "gsm8k", "train.jsonl")


@pytest.fixture(scope="session")
def math_dir(pytestconfig: pytest.Config) -> Path:
    """Return the folder with real answers in LaTeX, found like `gsm8k_dir`."""
    return _data_folder(pytestconfig, "math", "college_math_300.jsonl")


@pytest.fixture(scope="session")
def cases_dir(pytestconfig: pytest.Config) -> Path:
    """Return the folder with labeled inputs of graders, found like `gsm8k_dir`."""
    return _data_folder(pytestconfig, "cases", "math.jsonl", shared="cases")


def _data_folder(config: pytest.Config, name: str, file: str, *, shared: str | None = None) -> Path:
    named: Path | None = config.getoption(f"--{name}-dir")
    if named is not None:
        if not (named / file).is_file():
            pytest.fail(f"--{name}-dir={named} holds no {file}; name the folder that does")
        return named
    for folder in (REPOSITORY / "data" / name, REPOSITORY.parent / "shared" / (shared or f"data/{name}")):
        if (folder / file).is_file():
            return folder
    pytest.skip(f"no {file}: put it into data/{name} or name its folder by --{name}-dir")


@pytest.fixture(scope="session")
def recorder() -> Iterator[ProcessPoolExecutor]:
    """Yield a process that acts as ranks of engines, so that vLLM is imported only once."""
    from tests.helpers.one_process import one_process

    with one_process() as pool:
        yield pool


_FINISHED_RUNS = frozenset(("quickstart", "four_ranks"))
"""Fixtures of tests/e2e/conftest.py that several files read."""
_READERS = tuple(
    f"test_{name}.py"
    for name in ("bad_input", "evaluate", "layouts", "quickstart", "report_page_long", "tensorboard_long")
)
"""Files of e2e/ that read them, and are one group, so that each run is made once."""
_TIERS = ("parallel", "e2e", "engine", "unit")
"""The tiers with the longest groups first, so that no worker starts one at the end of the run."""


def _group_of(nodeid: str) -> str:
    file = Path(nodeid.partition("::")[0])
    tier = file.parts[1]
    return tier if tier == "parallel" or (tier == "e2e" and file.name in _READERS) else str(file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests by tier, and require that the readers of a finished run are in one group."""
    for item in items:
        reads = _FINISHED_RUNS & set(getattr(item, "fixturenames", ()))
        if reads and _group_of(item.nodeid) != "e2e":
            raise pytest.UsageError(
                f"{item.nodeid} reads {sorted(reads)}: add its file to _READERS in tests/conftest.py"
            )
    items.sort(key=lambda item: _rank_of(_group_of(item.nodeid)))


def _rank_of(group: str) -> tuple[int, bool]:
    tier = group if group in _TIERS else Path(group).parts[1]
    return _TIERS.index(tier) if tier in _TIERS else len(_TIERS), group != "e2e"


class GroupScheduling(LoadScopeScheduling):
    """Keep tests that share ranks, engines or finished runs on one worker; the largest groups come first.

    xdist's own groups (`--dist=loadgroup`) rename tests, and pytest 9.2 ignores that silently.
    """

    def _split_scope(self, nodeid: str) -> str:
        return _group_of(nodeid)


@pytest.hookimpl(optionalhook=True)  # also without xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    """With --no-loadscope-reorder groups are taken in the order of collection."""
    return GroupScheduling(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return
    import torch

    needed = marker.args[0] if marker.args else 1
    found = torch.cuda.device_count()
    if found < needed:
        pytest.skip(f"needs {needed} GPUs, this machine has {found}")
