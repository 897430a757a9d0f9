"""Runs untrusted programs with limits on time, memory, files, network and system calls.

It raises if isolation is unavailable, and never runs a program without isolation. Start reading at `sandbox.py`.
"""
