"""The launcher: detects Slurm, starts and supervises the ranks of a machine, and joins the machines of a job.

Start reading at `main.py`. Imports no torch, so that a wrong argument is reported at once.
"""
