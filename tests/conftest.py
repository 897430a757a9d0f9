"""Options and rules for all tests: where the GSM8K files are, and which tests this machine cannot run."""

from __future__ import annotations

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


@pytest.fixture(scope="session")
def gsm8k_dir(pytestconfig: pytest.Config) -> Path:
    """The folder with GSM8K's train.jsonl; skips where there is none. A folder that was named must have it."""
    named: Path | None = pytestconfig.getoption("--gsm8k-dir")
    if named is not None:
        if not (named / "train.jsonl").is_file():
            pytest.fail(f"--gsm8k-dir={named} holds no train.jsonl; name the folder that does")
        return named
    for folder in (REPOSITORY / "data" / "gsm8k", REPOSITORY.parent / "shared" / "data" / "gsm8k"):
        if (folder / "train.jsonl").is_file():
            return folder
    pytest.skip("no GSM8K files: put train.jsonl and test.jsonl into data/gsm8k or name their folder by --gsm8k-dir")


class GroupScheduling(LoadScopeScheduling):
    """What shares ranks, engines or finished runs stays on one worker; the largest groups come first.

    xdist's own groups (`--dist=loadgroup`) rename tests, which pytest 9.2 ignores without a word.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.partition("::")[0])
        tier = file.parts[1]
        if tier == "parallel" or (tier == "e2e" and file.name != "test_resume.py"):
            return tier
        return str(file)


@pytest.hookimpl(optionalhook=True)  # also without xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    """With --no-loadscope-reorder groups are taken in the order of collection: e2e, engine, parallel, unit."""
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
