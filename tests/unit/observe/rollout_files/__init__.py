"""Tests of grpo_mega/observe/rollout_files."""
