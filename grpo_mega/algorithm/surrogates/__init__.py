"""Surrogates, one file for each value of `algorithm.surrogate`. The contract is `algorithm/base.py`.

ratio = exp(log_ratio), log_ratio = log_probs - old_log_probs. An infinity that remains (A < 0 and log_ratio above 88 in
float32) is reported by the check of the update for non-finite losses.
Asserted by tests/unit/algorithm/test_loss.py by hand and by tests/unit/algorithm/test_algorithms.py against the papers.
"""
