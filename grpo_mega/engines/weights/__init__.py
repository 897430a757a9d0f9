"""Recording of an engine's weight loader, and the writing of synchronized slices to where its kernels read them.

Shared by the vLLM and SGLang adapters; imports neither. Start reading at `loader_recording.py`, then `sink.py`.
"""
