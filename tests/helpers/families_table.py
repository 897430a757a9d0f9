"""Print the table of docs/measurements/families.md: the differences that test_families.py checks in the long tier.

    python -m tests.helpers.families_table [MODEL ...] [--quick] [--out FILE.json]

Prints a row per model and layout as soon as it is measured; exit code 1 if a difference is above its tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.helpers.family_updates import FAMILY_MODELS, FamilyLaboratory, differences, is_within, layouts_of
from tests.helpers.ranks import RankPool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: all of {', '.join(FAMILY_MODELS)}")
    parser.add_argument("--quick", action="store_true", help="the layouts of the quick suite only")
    parser.add_argument("--out", type=Path, help="JSON file; keeps earlier rows and adds the rows of this call")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out is not None and args.out.exists() else {}
    print("| model | layout | logits | log-probs | gradient | weights | |\n|---|---|---|---|---|---|---|")
    missed = 0
    with tempfile.TemporaryDirectory(prefix="families_") as folder:
        pool = RankPool()
        laboratory = FamilyLaboratory(pool, Path(folder))
        for name in args.models or FAMILY_MODELS:
            for layout in (*layouts_of(name, quick=True), *(() if args.quick else layouts_of(name, quick=False))):
                try:
                    found = differences(laboratory.run(name, layout), laboratory.expected(name))
                except AssertionError as error:
                    missed += 1
                    print(f"| {name} | {layout} | failed | | | | {error} |", flush=True)
                    continue
                missed += not is_within(found)
                numbers = " | ".join(f"{x:.1e}" for x in (found.logits, found.log_probs, found.gradient, found.weights))
                remark = "" if is_within(found) else f"missed: {found.gradient_of}"
                print(f"| {name} | {layout} | {numbers} | {remark} |", flush=True)
                rows[f"{name} {layout}"] = asdict(found)
                if args.out is not None:
                    args.out.write_text(json.dumps(rows, indent=1) + "\n")
        pool.close()
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
