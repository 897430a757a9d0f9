"""Measures what observing costs: the share of a quickstart step, and the bytes of TensorBoard per 1,000 steps.

    python tools/bench_observe.py [--steps 40] [--json]

One process trains the quickstart in alternating blocks of steps with everything on (metrics.jsonl, TensorBoard, rollout
files, alarms) and everything off, so that both have the same machine, model and speed of it. The steps are real; the
blocks differ only in the observer of the loop. The first block of each kind is not counted.
`measured` is the median of (seconds of the observer in a step) / (seconds of the step), `reference` the limit.

Asserted by tests/unit/tools/test_bench_observe.py.
"""
