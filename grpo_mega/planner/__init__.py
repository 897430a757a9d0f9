"""Plans of a run's memory and time, made before the run starts, without a GPU and without weights.

The planner imports neither policy nor engines; it sees them only through grpo_mega/interfaces.py.
"""
