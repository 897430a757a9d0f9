"""GRPO post-training of large language models: a Megatron-Core policy and an inference engine on the same devices."""

__version__ = "0.2.0"
