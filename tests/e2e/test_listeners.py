"""No process of a job on one machine can be reached from other machines."""

from __future__ import annotations

from tests.helpers.finished_runs import ObservedRun


def test_all_listeners_of_a_job_on_one_machine_are_on_loopback(two_ranks: ObservedRun) -> None:
    """Two data-parallel ranks with vLLM."""
    assert len(two_ranks.listeners) >= 1  # the store and gloo of the ranks
    addresses = {address for _, address in two_ranks.listeners}
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, two_ranks.listeners
