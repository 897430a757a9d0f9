"""Every check that can be made before a job starts: this machine, and what a config asks of it.

    python tools/doctor.py CONFIG [section.key=value ...] [--json]
    python tools/doctor.py --machine [--json]

Run it on a node of the job. Starts no rank, reads no weight (headers only), writes nothing.

Exit code 0: nothing failed (warnings may stand); 2: a check failed, or the input is wrong; 1: a failure of ours.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from grpo_mega.config.load import load_config
from grpo_mega.doctor.examine import examine, examine_machine
from grpo_mega.doctor.finding import Finding, in_words
from grpo_mega.parallel.topology import Topology
from grpo_mega.train import wanted_world_size
from grpo_mega.types import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", help="YAML of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--machine", action="store_true", help="this machine alone, without a config")
    parser.add_argument("--json", action="store_true", help="a list of {check, status, message, remedy}, last line")
    args = parser.parse_intermixed_args(argv)
    warnings.simplefilter("ignore")  # libraries warn of what this machine lacks
    try:
        findings = diagnose(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(in_words(findings))
    if args.json:
        print(json.dumps([finding.as_json() for finding in findings]))
    failed = [finding for finding in findings if finding.status == "fail"]
    for finding in failed:
        print(f"error: {finding.check}: {finding.message}; {finding.remedy}", file=sys.stderr)
    return 2 if failed else 0


def diagnose(args: argparse.Namespace) -> list[Finding]:
    """Raises UserError: the config cannot be read, or the ranks are no layout."""
    if args.machine:
        return examine_machine()
    if args.config is None:
        raise UserError("CONFIG is missing", remedy="name a config, or use --machine")
    config = load_config(args.config, args.overrides)
    return examine(config, Topology.of(config, wanted_world_size(config)))
