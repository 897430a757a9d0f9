"""Tiny base models, taught on worked examples before a run. Plain torch and transformers, no distributed code."""

from grpo_mega.tiny_base.train import ensure_base

__all__ = ["ensure_base"]
