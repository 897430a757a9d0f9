"""Measurements of a built policy: module sizes, memory use, full gradients, the mapping of slices.

Used by the planner's module counter and by the tools; training does not need it.
"""
