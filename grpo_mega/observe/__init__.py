"""What one sees of a run: its folder, log, metrics, live display, times and summary. Only `log` is for every rank."""
