"""Generates docs/reference/rollouts.md from the table of columns.

    python tools/dev/make_rollouts_reference.py [--check]

`--check` writes nothing and exits with code 1 if the committed file differs. Asserted by
tests/unit/observe/rollout_files/test_column_table.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grpo_mega.observe.rollout_files.column_table import reference

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "rollouts.md"


def main() -> None:
    """Write the file, or compare it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    if parser.parse_args().check:
        sys.exit(0 if REFERENCE.read_text() == reference() else 1)
    REFERENCE.write_text(reference())


if __name__ == "__main__":
    main()
