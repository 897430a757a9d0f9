"""Outputs of a run: folder, log, metrics, progress display, timers and summary. Only `log` is used by every rank."""
