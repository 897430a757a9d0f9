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


_SHARING = {
    "e2e/finished runs": ("bad_input", "evaluate", "layouts", "quickstart", "report_page_long", "tensorboard_long"),
    "e2e/two ranks": ("engine_failure", "listeners", "replay", "resume", "trace"),
    "engine/two ranks": ("vllm_engine", "weight_sync"),
    "engine/contract": ("engine_contract", "partial_rollouts", "sglang_exit"),
}
"""Groups of files that share session fixtures of their folder's conftest.py, so that each is made once."""
_FIRST = (
    *("parallel", "e2e/finished runs", "e2e/two ranks", "e2e", "engine/two ranks", "engine/contract", "engine"),
    *("unit/tools/test_gpu_rehearsal.py", "unit/policy/test_local_modules_on_cuda.py", "unit/rewards/test_pool.py"),
)
"""Groups, folders and files with the longest ones first, so that no worker starts one at the end of the run."""
_OWNED = {"quickstart": "e2e/finished runs", "four_ranks": "e2e/finished runs", "two_ranks": "e2e/two ranks"}
"""Fixtures that are whole runs, and the group of the files that may use them."""
_GROUPS = {f"{group.partition('/')[0]}/test_{name}.py": group for group, names in _SHARING.items() for name in names}


def _group_of(nodeid: str) -> str:
    """Return "parallel", the group of the file if it shares fixtures with others, or the file itself."""
    file = Path(*Path(nodeid.partition("::")[0]).parts[1:])
    return "parallel" if file.parts[0] == "parallel" else _GROUPS.get(str(file), str(file))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests by group, and require that all readers of a finished run are in one group."""
    for item in items:
        for name in _OWNED.keys() & set(getattr(item, "fixturenames", ())):
            if _group_of(item.nodeid) != _OWNED[name]:
                raise pytest.UsageError(
                    f"{item.nodeid} reads {name}: add its file to {_OWNED[name]!r} of _SHARING in tests/conftest.py"
                )
    items.sort(key=lambda item: _rank_of(_group_of(item.nodeid)))


def _rank_of(group: str) -> int:
    for name in (group, group.partition("/")[0]):
        if name in _FIRST:
            return _FIRST.index(name)
    return len(_FIRST)


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
