"""The training job: build it, run its loop, move memory between phases, report each step.

Start reading at `loop.py`: one screen holds a training step. `run.py` opens the run folder and resumes, `build.py`
constructs the parts, `phases.py` is the only caller of sleep, wake, offload and reload.
"""
