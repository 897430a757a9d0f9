"""Advantage estimators: functions from the rewards of a step to advantages. The contract is `algorithm/base.py`.

Asserted by tests/unit/algorithm/test_advantage.py and tests/unit/algorithm/test_gae.py by hand, and by
tests/unit/algorithm/test_algorithms.py against the papers.
"""
