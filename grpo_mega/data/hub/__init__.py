"""Models and data sets of a Hugging Face hub: their commits, the choice of their files, and their download.

`fetch.with_hub_inputs` is the entry point. `huggingface_hub` and `datasets` are imported only in a process that asks
the hub; a process whose config names commits that the cache holds needs neither.
"""
