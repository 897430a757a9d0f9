"""One file per built-in reward; `grpo_mega.rewards.base.BUILTIN_REWARDS` maps their names."""
