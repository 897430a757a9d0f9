"""Trackers of other systems, which show the metrics of a run; each has one adapter."""
