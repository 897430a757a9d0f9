"""Tiny base models: supervised fine-tuning of random weights on worked examples, before a run.

Start reading at `base_folder.py`.
"""

from grpo_mega.tiny_base.base_folder import ensure_base

__all__ = ["ensure_base"]
