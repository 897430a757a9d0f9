"""List the configs that are shipped with the package, or print one of them.

    grpo-mega configs [NAME]

Every command with an argument CONFIG accepts such a name instead of a file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_mega.config.option_parser import OptionParser
from grpo_mega.config.shipped import find_config, shipped_config_names


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="name of a shipped config to print (default: list all names)")
    args = parser.parse_args(argv)
    if args.name is None:
        print("\n".join(shipped_config_names()))
        return 0
    path = find_config(Path(args.name))
    if not path.is_file():
        print(f"error: {args.name!r} is not a shipped config; `grpo-mega configs` lists them", file=sys.stderr)
        return 2
    print(path.read_text(encoding="utf-8"), end="")
    return 0
