"""Discrete-event simulation of the steps of a run with given lengths of answers: synchronous, partial, asynchronous."""
