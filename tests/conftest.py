"""Options and rules for all tests: where the GSM8K files are, and which tests this machine cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest

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


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers share the tests by these groups: what shares ranks, engines or finished runs stays together."""
    for item in items:
        tier, *rest = item.path.relative_to(REPOSITORY / "tests").parts
        item.add_marker(pytest.mark.xdist_group(tier if tier in ("e2e", "parallel") else f"{tier}/{rest[0]}"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return
    import torch

    needed = marker.args[0] if marker.args else 1
    found = torch.cuda.device_count()
    if found < needed:
        pytest.skip(f"needs {needed} GPUs, this machine has {found}")
