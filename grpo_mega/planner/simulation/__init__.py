"""Simulates steps of a run with given lengths of answers: synchronous, partial and asynchronous, by discrete events."""
