"""Compare random models in random layouts with transformers, by seed.

    python -m tests.helpers.random_sweep FIRST LAST

Prints a row per seed: differences of logits, log-probs, gradients and weights, then the difference between the float32
and float64 gradients of transformers; exit code 1 if a difference is above the tolerance of test_random_families.py.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

from tests.helpers.family_updates import is_within, measure_random
from tests.helpers.random_families import random_case
from tests.helpers.ranks import RankPool


def main() -> int:
    """Compare the models of all seeds from FIRST to LAST; return the exit code."""
    first, last = map(int, sys.argv[1:])
    missed = []
    with tempfile.TemporaryDirectory(prefix="sweep_") as folder:
        pool = RankPool()
        for seed in range(first, last + 1):
            config, world, parallel = random_case(seed)
            layout = ",".join(f"{k}={v}" for k, v in parallel.model_dump(exclude_defaults=True).items())
            row = f"| {seed} | {config['model_type']} | {world} | {layout} |"
            try:
                found, rounding = measure_random(pool, Path(folder), seed)
            except (AssertionError, TimeoutError):
                missed.append(seed)
                print(f"{row} failed |", flush=True)
                traceback.print_exc()
                continue
            if not is_within(found, rounding):
                missed.append(seed)
            numbers = " | ".join(f"{x:.1e}" for x in (found.logits, found.log_probs, found.gradient, found.weights))
            remark = "" if is_within(found, rounding) else f"missed: {found.gradient_of}"
            print(f"{row} {numbers} | {rounding.gradient:.1e} | {remark} |", flush=True)
        pool.close()
    print(f"missed: {missed}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
