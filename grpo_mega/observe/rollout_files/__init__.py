"""Rollout files: one Parquet part per prompt shard and step, with all data that a replay of the step needs.

`rollouts/step_000012/part-00003.parquet` holds the rollouts of prompt shard 3. The columns are those of column_table.py
(docs/reference/rollouts.md). A part is whole or not there. All parts of a step are on disk before the checkpoint of the
step is visible (trainer/save_points.py).
"""
