"""Following a run from another terminal or a login node, read-only (`grpo-mega watch`)."""
