"""Measurements of GPUs, nodes and ranks during a run, and their reduction to metrics of the job."""
