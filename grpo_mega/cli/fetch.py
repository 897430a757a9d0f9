"""Download the models and data sets that a config names on a Hugging Face hub, before a job needs them.

    grpo-mega fetch CONFIG [section.key=value ...] [--json]
    python tools/fetch.py CONFIG [section.key=value ...] [--json]

Downloaded are config, tokenizer and safetensors of `model.path`, and the files of the splits of `data.train` and
`data.eval`; files that the cache holds already are not downloaded again. HF_HOME or HF_HUB_CACHE names the cache,
HF_ENDPOINT the hub, and HF_TOKEN the token for private and gated repositories. With HF_HUB_OFFLINE=1 the command only
checks the cache.

Exit code 0: all files are in the cache; 2: the input is wrong, or the hub did not give a file; 1: a failure of the tool
itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.load import load_config
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.data.hub.fetch import with_hub_inputs


@errors_as_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON list of {key, name, revision} as the last line"
    )
    args = parser.parse_intermixed_args(argv)
    config = with_hub_inputs(load_config(args.config, args.overrides))
    found = [("model.path", config.model.path, config.model.revision)] if config.model.is_on_hub else []
    for key, sources in (("data.train", config.data.train_sets), ("data.eval", config.data.eval_sets)):
        found += [(f"{key}[{i}].path", s.path, s.revision) for i, s in enumerate(sources) if s.is_on_hub]
    for key, name, revision in found:
        print(f"{key}={name}: revision {revision} is in the cache")
    if not found:
        print(f"{args.config} names no model and no data set of the hub: nothing to fetch")
    if args.json:
        rows = [{"key": key, "name": name, "revision": revision} for key, name, revision in found]
        print(json.dumps(rows))
    return 0
