"""Checkpoints of a run and the export to Hugging Face format."""
