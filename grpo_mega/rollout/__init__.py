"""Sampling of groups: waves, dynamic sampling, several turns, held-out evaluation.

Uses the engine and the rewards through `interfaces.py`; never touches the policy. Start reading at `sampler.py`.
"""
