"""docs/asynchrony.md: its config and its commands are accepted. tests/e2e/test_asynchrony.py makes such a run."""

from __future__ import annotations

import re
import shlex

import yaml

from grpo_mega.config.load import load_config
from grpo_mega.serve import make_parser
from tests.helpers.guides import shell_blocks
from tests.helpers.jobs import REPOSITORY

TEXT = (REPOSITORY / "docs" / "asynchrony.md").read_text(encoding="utf-8")
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"
ONE_UPDATE = "train.minibatches_per_epoch=1"  # the quickstart has 8, more than the staleness of this config


def test_the_config_of_the_guide_is_valid() -> None:
    sections = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[0])
    overrides = [f"{name}.{key}={value}" for name, section in sections.items() for key, value in section.items()]
    config = load_config(QUICKSTART, [ONE_UPDATE, *overrides])
    assert (config.train.max_staleness, config.train.slice_tokens) == (4, 64)


def test_the_commands_of_the_guide_are_accepted() -> None:
    (block,) = shell_blocks("asynchrony.md")
    serve, train = block.replace("\\\n", "").strip().splitlines()
    script, *options = shlex.split(serve.removesuffix("&"))
    served = make_parser().parse_intermixed_args(options)
    program, path, *overrides = shlex.split(train)
    assert (script, program, str(served.config)) == ("launch/serve.sh", "launch/train.sh", path)
    config = load_config(REPOSITORY / path, overrides)
    assert config.train.max_staleness > 0
    assert config.engine.urls == (f"127.0.0.1:{served.port}",)
