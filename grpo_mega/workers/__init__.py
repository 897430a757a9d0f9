"""Worker processes of rewards and environments: their start, limits and messages.

Imports no torch, so a worker starts in a fraction of a second.
"""
