"""Tiny base models, taught on worked examples before a run. Plain torch and transformers, no distributed code."""

from grpo_mega.base_model.teach import ensure_base

__all__ = ["ensure_base"]
