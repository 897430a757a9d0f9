"""Start of a job: where it runs, the ranks of this machine, their supervision, rendezvous of machines, Slurm.

Start reading at `main.py`. Imports no torch: it must find a wrong argument at once.
"""
