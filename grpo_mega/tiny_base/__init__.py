"""Tiny base models, pre-trained on worked examples before a run.

Plain torch and transformers without distributed code. Start reading at `train.py`.
"""

from grpo_mega.tiny_base.train import ensure_base

__all__ = ["ensure_base"]
