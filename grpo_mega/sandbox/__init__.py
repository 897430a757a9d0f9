"""Runs untrusted programs with limits on time, memory, files, network and system calls.

Raises where isolation is unavailable; it never runs a program without it. Start reading at `sandbox.py`.
"""
