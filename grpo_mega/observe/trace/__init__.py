"""The trace of a run: recorder.py writes a file per rank, merge.py makes one file for Perfetto of them."""
