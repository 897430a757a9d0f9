"""The kit of tools/gpu_proof.py: its script, its installation, and a bare environment that it completes."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from grpo_mega.types import UserError
from tests.helpers.jobs import REPOSITORY
from tools.gpu_checks.kit import install_kit
from tools.wheel_parts import main as wheel_parts

SCRIPT = REPOSITORY / "launch" / "gpu_proof_kit.sh"
BARE = ("torch", "transformers", "safetensors", "numpy", "pip")  # what the machine with the GPU has


def make_wheel(folder: Path, name: str, size: int = 10) -> Path:
    """Write a wheel with one module, which holds `size` characters."""
    folder.mkdir(exist_ok=True)
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", f"VALUE = {'x' * size!r}\n")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Python: >3.90\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_wheels_are_installed_without_index_and_without_changing_the_environment(tmp_path: Path) -> None:
    """A wheel that states a newer Python is installed, as megatron-core must be."""
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    make_wheel(wheels, "kit_first")
    make_wheel(wheels, "kit_second")
    assert install_kit(wheels, site) == ["kit_first-1.0-py3-none-any.whl", "kit_second-1.0-py3-none-any.whl"]
    assert {"kit_first.py", "kit_second.py"} <= {path.name for path in site.iterdir()}
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kit_first")


def test_a_wheel_in_parts_is_joined(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make_wheel(whole, "kit_large", size=3 * 2**20)
    assert wheel_parts(["cut", str(whole), str(parts), "--max-mib", "1"]) == 0
    assert list(parts.glob("*.whl")) == []
    install_kit(parts, tmp_path / "site")
    assert (tmp_path / "site" / "kit_large.py").stat().st_size > 3 * 2**20
    for name in ("kit_large-1.0-py3-none-any.whl", "kit_large-1.0-py3-none-any.whl.part001"):
        (parts / name).unlink()
    with pytest.raises(UserError, match=r"part001 missing") as error:
        install_kit(parts, tmp_path / "other")
    assert error.value.remedy == "copy every file of the kit again"


def test_a_wheel_for_another_python_is_rejected(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "wheels", "kit_old")
    wheel.rename(wheel.with_name("kit_old-1.0-cp38-cp38-manylinux2014_x86_64.whl"))
    with pytest.raises(UserError) as error:
        install_kit(tmp_path / "wheels", tmp_path / "site")
    assert "--wheels=" in error.value.message
    assert f"make them for Python {sys.version_info[0]}.{sys.version_info[1]}" in error.value.remedy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--python", "3.9"], "--python 3.9: must be 3.11, 3.12 or 3.13"),
        (["--max-mib", "0"], "--max-mib 0: must be a positive number of MiB"),
        (["--out"], "--out needs a value"),
        (["--fast"], "unknown argument --fast"),
        (["--out", str(REPOSITORY)], "exists already"),
    ],
)
def test_wrong_arguments_of_the_script_are_named(arguments: list[str], message: str) -> None:
    done = run_script(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_script_prints_its_usage() -> None:
    done = run_script("--help")
    assert done.returncode == 0
    assert "usage: launch/gpu_proof_kit.sh" in done.stdout


def test_every_package_of_the_kit_has_a_version() -> None:
    names = re.search(r"^names=\((.*)\)$", SCRIPT.read_text(), re.MULTILINE)
    assert names is not None
    pinned = re.findall(r"^([\w-]+)==", (REPOSITORY / "constraints" / "cpu.txt").read_text(), re.MULTILINE)
    assert set(names[1].split()) <= set(pinned)


def link_bare_packages(folder: Path) -> None:
    """Link what BARE needs, as installed here, but for the packages of the kit and what only this environment has."""
    kit = {"pydantic", "pydantic-core", "annotated-types", "typing-inspection", "megatron-core", "psutil", "xxhash"}
    folder.mkdir()
    waiting, seen = list(BARE), set(kit)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        package = importlib.metadata.distribution(name)
        for line in package.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
        for top in {file.parts[0] for file in package.files or () if file.parts[0] != ".."}:
            if not (folder / top).exists():
                (folder / top).symlink_to(package.locate_file(top))


@pytest.mark.long
def test_a_bare_environment_and_the_kit_are_enough_for_the_whole_check(tmp_path: Path) -> None:
    """Builds the real kit for this Python from the configured package index."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    kit, bare, site = tmp_path / "kit", tmp_path / "venv", tmp_path / "bare"
    made = subprocess.run(
        ["bash", SCRIPT, "--python", version, "--out", kit], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert sum(file.stat().st_size for file in kit.iterdir()) < 60 * 2**20
    link_bare_packages(site)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    (bare / "lib" / f"python{version}" / "site-packages" / "bare.pth").write_text(f"{site}\n")
    python = bare / "bin" / "python"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    missing = subprocess.run(
        [python, "-c", "import pydantic"], env=environment, capture_output=True, text=True, check=False
    )
    assert "No module named 'pydantic'" in missing.stderr
    done = subprocess.run(
        [python, REPOSITORY / "tools" / "gpu_proof.py", "--rehearse", "--minutes", "12", "--wheels", kit, "--out",
         tmp_path / "out"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_kit_exists_for_every_python(version: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", SCRIPT, "--python", version, "--out", tmp_path / "kit"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "kit").glob("*.whl"))) == 8
