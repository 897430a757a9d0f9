"""Check this machine and a config before a job starts.

    grpo-mega doctor CONFIG [section.key=value ...] [--json]
    grpo-mega doctor --machine [--json]
    python tools/doctor.py CONFIG [section.key=value ...] [--json]

Run it on a node of the job. It starts no rank, reads no weights (only headers), and writes nothing but the cache of the
hub: data sets, tokenizer and config of a model that the config names there.

Exit code 0: no check failed (there can be warnings); 2: a check failed, or the input is wrong; 1: a failure of the
tool itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.load import load_config, precedence_notes
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.data.hub.fetch import with_hub_inputs
from grpo_mega.doctor.examine import examine, examine_machine
from grpo_mega.doctor.finding import Finding, in_words
from grpo_mega.parallel.topology import Topology
from grpo_mega.train import wanted_world_size
from grpo_mega.types import UserError


@errors_as_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", help="YAML of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--machine", action="store_true", help="check this machine only, without a config")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON list of {check, status, message, remedy} as the last line"
    )
    args = parser.parse_intermixed_args(argv)
    warnings.simplefilter("ignore")  # libraries warn about missing optional features
    findings = diagnose(args)
    print(in_words(findings))
    if args.json:
        print(json.dumps([finding.as_json() for finding in findings]))
    failed = [finding for finding in findings if finding.status == "fail"]
    for finding in failed:
        print(f"error: {finding.check}: {finding.message}; {finding.remedy}", file=sys.stderr)
    return 2 if failed else 0


def diagnose(args: argparse.Namespace) -> list[Finding]:
    """Return the findings of all checks.

    Raises:
        UserError: the config cannot be read, or the layout does not divide the ranks.
    """
    if args.machine:
        return examine_machine()
    if args.config is None:
        raise UserError("CONFIG is missing", remedy="name a config, or use --machine")
    config = with_hub_inputs(load_config(args.config, args.overrides), part="small")
    for note in precedence_notes(args.config, args.overrides):
        print(f"note: {note}", file=sys.stderr)
    return examine(config, Topology.of(config, wanted_world_size(config)))
