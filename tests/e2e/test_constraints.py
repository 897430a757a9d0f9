"""The constraints of CUDA environments have wheels for each version of Python that docs/install.md names.

`uv` reads the metadata of remote wheels by ranges of bytes: about 60 MB. `pip install --dry-run` would download the
wheels of torch and of the engines, several GB, because the package index does not serve their metadata apart (PEP 658).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.long
GLIBC = "x86_64-manylinux_2_34"
OLD_GLIBC = "x86_64-manylinux_2_28"


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the program in an environment of its own; skip if the package index is not reachable."""
    folder = tmp_path_factory.mktemp("uv")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "uv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"the package index is not reachable: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin" / "uv"


def requirements(engine: str, folder: Path) -> Path:
    """Write what launch/setup.sh installs with dependencies. It installs megatron-core apart, ignoring its Python."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras[engine], *extras["dev"], *extras["fp8"]]
    kept = [line for line in lines if not line.startswith(("megatron-core", "transformer-engine"))]
    file = folder / f"{engine}.in"
    file.write_text("\n".join(kept))
    return file


def resolve(uv: Path, engine: str, python: str, platform: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        uv, "pip", "compile", "--quiet", "--no-build", "--no-header", "--no-annotate",
        "--python-platform", platform, "--python-version", python,
        "--constraint", REPOSITORY / "constraints" / f"cuda-{engine}.txt",
        "--output-file", folder / "resolved.txt", requirements(engine, folder),
    ]  # fmt: skip
    environment = {**os.environ, "UV_CACHE_DIR": str(folder.parent / "uv_cache")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.parametrize(
    ("engine", "python"),
    [("vllm", "3.11"), ("vllm", "3.12"), ("vllm", "3.13"), ("sglang", "3.11"), ("sglang", "3.12")],
)
def test_constraints_have_wheels(uv: Path, engine: str, python: str, tmp_path: Path) -> None:
    done = resolve(uv, engine, python, GLIBC, tmp_path)
    assert done.returncode == 0, done.stderr
    resolved = (tmp_path / "resolved.txt").read_text().splitlines()
    constraints = (REPOSITORY / "constraints" / f"cuda-{engine}.txt").read_text().splitlines()
    pinned = {line.split("#")[0].strip() for line in constraints if line[:1].isalpha()}
    assert {line for line in pinned if line.startswith(("torch==", f"{engine}=="))} <= set(resolved)


@pytest.mark.parametrize(
    ("engine", "python", "platform", "package"),
    [
        ("vllm", "3.12", OLD_GLIBC, "llguidance"),
        ("sglang", "3.12", OLD_GLIBC, "sglang"),
        ("sglang", "3.13", GLIBC, "outlines-core"),
    ],
)
def test_what_the_guide_excludes_has_no_wheels(
    uv: Path, engine: str, python: str, platform: str, package: str, tmp_path: Path
) -> None:
    """A failure means that docs/install.md, and for glibc the doctor, exclude too much."""
    done = resolve(uv, engine, python, platform, tmp_path)
    assert done.returncode != 0
    assert package in done.stderr
