"""The wheel, installed without the checkout: its commands plan, examine and score, from any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.helpers.jobs import REPOSITORY

BUILD_FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `bin` folder of a new environment with the wheel; it uses the heavy packages of this environment."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in files:
        if name.startswith(("grpo_mega/", "configs/")) or name in BUILD_FILES:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    environment = without_checkout()
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(root), str(source)]
    subprocess.run(build, check=True, env=environment, cwd=root)
    venv.create(root / "environment", with_pip=False)
    python = root / "environment" / "bin" / "python"
    (wheel,) = root.glob("*.whl")
    install = [*pip, "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)]
    subprocess.run(install, check=True, env=environment, cwd=root)
    (site,) = (root / "environment" / "lib").glob("python*/site-packages")
    (site / "heavy_packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(source)
    return python.parent


def without_checkout() -> dict[str, str]:
    """Return the environment variables of a user without a checkout."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def run_installed(wheel_bin: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = without_checkout()
    command = [str(wheel_bin / "grpo-mega"), *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_package_is_the_installed_one(wheel_bin: Path, tmp_path: Path) -> None:
    code = "import grpo_mega; print(grpo_mega.__file__)"
    environment = without_checkout()
    done = subprocess.run(
        [str(wheel_bin / "python"), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert Path(done.stdout.strip()).is_relative_to(wheel_bin.parent), done.stdout + done.stderr


def test_a_shipped_config_is_planned_by_its_name(wheel_bin: Path, tmp_path: Path) -> None:
    done = run_installed(wheel_bin, tmp_path, "plan", "qwen2.5-7b-1n8g-tp2-vllm", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["fits"] is True


def test_the_doctor_examines_the_machine(wheel_bin: Path, tmp_path: Path) -> None:
    done = run_installed(wheel_bin, tmp_path, "doctor", "--machine", "--json")
    assert done.returncode == 0, done.stderr
    assert {"check", "status", "message", "remedy"} == set(json.loads(done.stdout.splitlines()[-1])[0])


def test_completions_are_scored(wheel_bin: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "2+3?", "completion": "#### 5", "answer": "#### 5"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_installed(wheel_bin, tmp_path, "score", "--reward", "gsm8k", "--workers", "1", "rows.jsonl")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reward"] == 1.0


def test_a_wrong_command_is_exit_code_2_without_a_traceback(wheel_bin: Path, tmp_path: Path) -> None:
    done = run_installed(wheel_bin, tmp_path, "plan", "no-such-config")
    assert done.returncode == 2
    assert "no-such-config" in done.stderr
    assert "Traceback" not in done.stderr
