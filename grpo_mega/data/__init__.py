"""Prompts from files, their tokens, and rows of packed rollouts.

Start at `dataset.py` for the prompts of a run (it uses `records.py`, `prompt_rows.py` and `chat.py`), at
`example_dataset.py` for the examples of supervised fine-tuning, and at `pack.py` for the rows of a microbatch. Nothing
here communicates between ranks.
"""
