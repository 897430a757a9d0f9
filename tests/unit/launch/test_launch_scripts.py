"""launch/*.sh and .ci/run: arguments, exit codes, and an environment that is built only once."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.helpers.stub_checkout import make_checkout, python_environment

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted([*ROOT.glob("launch/*.s[hb]*"), ROOT / ".ci" / "run"])


def run_script(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def finished_environment(folder: Path, kind: str, extras: str) -> Path:
    """Create an environment with the marker of a finished build only: a second build step in it would fail."""
    files = [ROOT / "pyproject.toml", ROOT / "constraints" / f"{kind}.txt", ROOT / "launch" / "setup.sh"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    folder.mkdir()
    (folder / ".grpo_mega-complete").write_text(f"{kind} {extras} {digest}\n")
    return folder


def machine_with_gpu(folder: Path) -> str:
    """Return a PATH on which nvidia-smi finds a GPU."""
    folder.mkdir()
    smi = folder / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0'\n")
    smi.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def machine_without_gpu(folder: Path) -> str:
    """Return a PATH on which nvidia-smi finds no GPU."""
    path = machine_with_gpu(folder)
    (folder / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    return path


def file_times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(script: Path) -> None:
    assert run_script("bash", "-n", script).returncode == 0


@pytest.mark.parametrize("name", ["setup.sh", "train.sh", "serve.sh", "test.sh", "tensorboard.sh"])
def test_help_exits_zero_and_names_the_script(name: str, tmp_path: Path) -> None:
    shown = run_script(ROOT / "launch" / name, "--help", GRPO_MEGA_VENV=str(tmp_path / "venv"))
    assert shown.returncode == 0
    assert f"usage: launch/{name}" in shown.stdout + shown.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--with", "tensorrt"], "--with tensorrt: unknown name; use sglang, vllm, fp8, kernels or tests"),
        (["--with"], "--with needs a name"),
        (["--fast"], "unknown argument --fast"),
        (["--with=sglang,fp8"], "Transformer Engine needs CUDA"),
        (["--with", "kernels"], "FlashInfer needs CUDA"),
        (["--with", "local"], "--with local: unknown name"),
        (["--without"], "--without needs a name: transformer-engine"),
        (["--without", "vllm"], "--without vllm: unknown name; use transformer-engine"),
        (["--without=transformer-engine"], "Transformer Engine needs CUDA"),
    ],
)
def test_setup_rejects_wrong_arguments_before_it_builds(arguments: list[str], message: str, tmp_path: Path) -> None:
    path = machine_without_gpu(tmp_path / "bin")
    result = run_script(ROOT / "launch/setup.sh", *arguments, GRPO_MEGA_VENV=str(tmp_path / "venv"), PATH=path)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "venv").exists()


def test_two_engines_in_one_cuda_environment_are_rejected_with_the_reason(tmp_path: Path) -> None:
    path = machine_with_gpu(tmp_path / "bin")
    result = run_script(
        ROOT / "launch/setup.sh", "--with", "sglang,vllm", GRPO_MEGA_VENV=str(tmp_path / "venv"), PATH=path
    )
    assert result.returncode == 2
    assert "torch 2.13.0" in result.stderr
    assert "torch 2.14.1" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_the_reason_names_the_versions_of_the_constraints() -> None:
    script = (ROOT / "launch/setup.sh").read_text()
    for kind, engine in (("vllm", "vLLM"), ("sglang", "SGLang")):
        lines = (ROOT / f"constraints/cuda-{kind}.txt").read_text().splitlines()
        pins = dict(line.split("#")[0].strip().split("==") for line in lines if "==" in line)
        assert f"{engine} {pins[kind]} needs torch {pins['torch']}" in script


def test_a_second_engine_in_a_cuda_environment_is_rejected(tmp_path: Path) -> None:
    venv = finished_environment(tmp_path / "venv", "cuda-vllm", "vllm")
    path = machine_with_gpu(tmp_path / "bin")
    before = file_times(venv)
    assert run_script(ROOT / "launch/setup.sh", GRPO_MEGA_VENV=str(venv), PATH=path).returncode == 0
    result = run_script(ROOT / "launch/setup.sh", "--with", "sglang", GRPO_MEGA_VENV=str(venv), PATH=path)
    assert result.returncode == 2
    assert "one CUDA environment" in result.stderr
    assert file_times(venv) == before


@pytest.mark.parametrize("arguments", [[], ["--with", "sglang"], ["--with=vllm"], ["--with", "tests"]])
def test_second_call_changes_nothing(arguments: list[str], tmp_path: Path) -> None:
    venv = finished_environment(tmp_path / "venv", "cpu", "sglang")
    path = machine_without_gpu(tmp_path / "bin")
    before = file_times(venv)
    again = run_script(ROOT / "launch/setup.sh", *arguments, GRPO_MEGA_VENV=str(venv), PATH=path)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert file_times(venv) == before


def test_the_tests_of_a_cuda_environment_need_no_second_engine(tmp_path: Path) -> None:
    venv = finished_environment(tmp_path / "venv", "cuda-vllm", "vllm")
    path = machine_with_gpu(tmp_path / "bin")
    again = run_script(ROOT / "launch/setup.sh", "--with", "tests", GRPO_MEGA_VENV=str(venv), PATH=path)
    assert (again.returncode, again.stderr) == (0, "")


PYTHON_THAT_RECORDS_PIP = """#!/bin/bash
case "$1 $2" in
    "-c "*) exit 0 ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/pyvenv.cfg" && exit 0 ;;
    "-m pip") echo "${NVTE_FRAMEWORK-} ${*:3}" >>"$PIP_CALLS" ;;
    "-m flashinfer") echo "$FLASHINFER_DISABLE_VERSION_CHECK flashinfer $3" >>"$PIP_CALLS" ;;
esac
"""


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("vllm", ()), ("sglang", ("--with", "sglang")), ("vllm", ("--with", "vllm,fp8"))],
)
def test_a_cuda_environment_gets_torch_then_megatron_then_the_rest_then_transformer_engine(
    tmp_path: Path, kind: str, arguments: tuple[str, ...]
) -> None:
    path = machine_with_gpu(tmp_path / "bin")
    python = tmp_path / "bin" / "python3.11"
    python.write_text(PYTHON_THAT_RECORDS_PIP)
    python.chmod(0o755)
    calls = tmp_path / "calls"
    result = run_script(
        ROOT / "launch/setup.sh", *arguments,
        GRPO_MEGA_VENV=str(tmp_path / "venv"), PATH=path, PIP_CALLS=str(calls),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    constraints = f"-c {ROOT}/constraints/cuda-{kind}.txt"
    torch, megatron, rest, engine, itself = calls.read_text().splitlines()
    assert f"{constraints} torch " in torch
    assert megatron.endswith(f"--no-deps --ignore-requires-python {constraints} megatron-core")
    assert rest.endswith(f"{constraints} -e {ROOT}[{kind},dev]")
    assert engine.startswith("pytorch ")
    assert engine.endswith(f"--no-build-isolation {constraints} transformer-engine[core_cu13,pytorch]")
    assert itself.endswith(f"-e {ROOT}")


def test_a_cuda_environment_without_transformer_engine_stays_without_it(tmp_path: Path) -> None:
    path = machine_with_gpu(tmp_path / "bin")
    python = tmp_path / "bin" / "python3.11"
    python.write_text(PYTHON_THAT_RECORDS_PIP)
    python.chmod(0o755)
    calls = tmp_path / "calls"
    variables = {"GRPO_MEGA_VENV": str(tmp_path / "venv"), "PATH": path, "PIP_CALLS": str(calls)}
    setup = ROOT / "launch/setup.sh"
    result = run_script(setup, "--without", "transformer-engine", "--with", "kernels", **variables)
    assert result.returncode == 0, result.stderr
    _, _, rest, kernels, itself = calls.read_text().splitlines()
    assert rest.endswith(f"-e {ROOT}[vllm,dev]")
    assert kernels == "1 flashinfer download-kernels"
    assert itself.endswith(f"-e {ROOT}")
    conflict = run_script(setup, "--with", "fp8", **variables)
    assert conflict.returncode == 2
    assert "--without transformer-engine left it out" in conflict.stderr


def test_a_folder_that_is_not_an_environment_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    path = machine_without_gpu(tmp_path.with_name(tmp_path.name + "-bin"))
    result = run_script(ROOT / "launch/setup.sh", GRPO_MEGA_VENV=str(tmp_path), PATH=path)
    assert result.returncode == 2
    assert "is not a Python environment" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("modules", "message"),
    [("version", "no Python 3.11, 3.12 or 3.13 was found"), ("venv", "has no venv module")],
)
def test_a_missing_python_is_named(modules: str, message: str, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "cut", "dirname", "ls", "paste", "sed", "sha256sum", "sort", "tr"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    for name in ("python3.11", "python3.12", "python3.13", "python3"):  # fails for a command that contains this word
        (tools / name).write_text(f'#!/bin/sh\ncase "$2" in *{modules}*) exit 1 ;; esac\n')
        (tools / name).chmod(0o755)
    result = run_script(ROOT / "launch/setup.sh", GRPO_MEGA_VENV=str(tmp_path / "venv"), PATH=str(tools))
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "venv").exists()


def test_tensorboard_names_a_missing_run_folder(tmp_path: Path) -> None:
    result = run_script(ROOT / "launch/tensorboard.sh", tmp_path / "none")
    assert result.returncode == 2
    assert "is not a folder" in result.stderr


def test_cpu_lock_pins_every_line_and_none_of_the_cuda_builds() -> None:
    lines = (ROOT / "constraints/cpu.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in pins)
    names = {line.split("==")[0].lower() for line in pins}
    assert not names & {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "apex"}


def test_every_tool_of_the_dev_extra_is_in_each_constraints_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split("[<>=]", each)[0] for each in project["optional-dependencies"]["dev"]]
    wanted = {name.lower().replace("-", "_") for name in names}
    for file in sorted((ROOT / "constraints").iterdir()):
        pinned = {line.split("==")[0].lower().replace("-", "_") for line in file.read_text().splitlines()}
        assert wanted <= pinned, file.name


def test_env_keeps_what_the_user_has_set() -> None:
    script = f'source "{ROOT}/launch/env.sh" && echo "$HF_HUB_OFFLINE $VLLM_CPU_KVCACHE_SPACE"'
    assert run_script("bash", "-c", script, HF_HUB_OFFLINE="0", VLLM_CPU_KVCACHE_SPACE="7").stdout == "0 7\n"


def test_a_tool_runs_in_the_environment_and_in_the_current_folder(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    (tmp_path / "own_code.py").write_text("def half(prompt, completion, reference):\n    return 0.5\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "answer": "b"}\n')
    command = [checkout / "launch" / "tool.sh", "score", "--reward", "own_code:half", "--workers", "1", "rows.jsonl"]
    env = {"PATH": "/usr/bin:/bin", **python_environment()}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"reward": 0.5' in done.stdout


@pytest.mark.parametrize("name", ["", "no_such_tool", "../setup"])
def test_an_unknown_tool_is_rejected_with_the_names(name: str) -> None:
    done = run_script(ROOT / "launch" / "tool.sh", *([name] if name else []))
    assert done.returncode == 2
    assert f"NAME={name} is not a tool" in done.stderr
    assert " score" in done.stderr


def test_the_guides_start_tools_in_the_environment() -> None:
    """A fresh checkout has no `python` with the packages: a command of a guide starts with a script or `grpo-mega`.

    Only the GPU check runs with the machine's own Python: it brings its wheels (`--wheels`).
    """
    guides = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "guides").glob("*.md")]
    for guide in guides:
        text = guide.read_text(encoding="utf-8")
        commands = re.findall(r"^python tools/.*$", text, re.MULTILINE)
        assert [command for command in commands if " --wheels " not in command] == [], guide
        for name in re.findall(r"^launch/tool\.sh (\S+)", text, re.MULTILINE):
            assert (ROOT / "tools" / f"{name}.py").is_file(), f"{guide}: {name}"
