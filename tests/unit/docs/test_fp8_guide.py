"""docs/fp8.md: its config is valid, its table equals that of the program, its commands print the shown output."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import yaml

from grpo_mega.cli import doctor, fp8_report, plan
from grpo_mega.config.fp8_rules import GENERATIONS, RECIPES
from grpo_mega.config.policy_sections import PrecisionConfig
from grpo_mega.config.rollout_sections import EngineConfig
from tests.helpers.guides import shell_blocks
from tests.helpers.jobs import REPOSITORY
from tests.helpers.tiny_models import make_tiny_model

TEXT = (REPOSITORY / "docs" / "fp8.md").read_text(encoding="utf-8")


def test_the_config_of_the_guide_is_valid() -> None:
    policy, engine = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL))
    fp8 = PrecisionConfig.model_validate(policy["precision"]).fp8
    assert fp8 is not None
    assert fp8.recipe == "blockwise"
    assert EngineConfig.model_validate(engine["engine"]).fp8 == "scales_fp32"
    kinds = get_args(get_args(EngineConfig.model_fields["fp8"].annotation)[0])
    rows = [line for line in TEXT.splitlines() if line.startswith(("| `scales_", "| `own_"))]
    assert [row.split("`")[1] for row in rows] == list(kinds)


@pytest.mark.parametrize("name", RECIPES)
def test_the_table_of_the_guide_equals_that_of_the_program(name: str) -> None:
    (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| `{name}` |")]
    _, _, devices, cuda = (cell.strip() for cell in line.strip("|").split("|"))
    recipe = RECIPES[name]
    if devices != "the same":
        assert devices == ", ".join(kinds for at, kinds in GENERATIONS.items() if recipe.least <= at < recipe.below)
    assert cuda == f"{recipe.cuda[0]}.{recipe.cuda[1]}"


@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="the guide shows a machine without GPUs")
def test_the_commands_of_the_guide_print_the_shown_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    asked, planned, reported, engine = (shlex.split(block) for block in shell_blocks("fp8.md"))
    (shown,) = re.findall(r"```text\n(.*?)\n```", TEXT, re.DOTALL)
    assert asked[:2] == ["launch/tool.sh", "doctor"]
    assert doctor.main(asked[2:]) == 2
    assert shown in capsys.readouterr().err
    assert planned[:2] == ["launch/tool.sh", "plan"]
    assert plan.main(planned[2:]) == 0
    assert "fits" in capsys.readouterr().out
    assert engine[:2] == planned[:2]
    assert plan.main(engine[2:]) == 0
    assert "engine tp 8, dp 4" in capsys.readouterr().out
    assert reported[:3] == ["launch/tool.sh", "fp8_report", "HF_DIR"]
    assert fp8_report.main([str(make_tiny_model(tmp_path)), *reported[3:]]) == 0
    assert "power_of_two scales" in capsys.readouterr().out
