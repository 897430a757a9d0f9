"""The training job of one rank: build it, run its loop, move memory between phases, report each step.

From a batch to its loss there are four files:

    1. trainer/learning.py    the training part of a step: `make_batch`, `with_log_probs`, `update_critic`, `update`
    2. trainer/batch.py       `build_batch`: rollouts to packed microbatches of this rank
    3. trainer/objective.py   `Objective.credit`: advantages and token weights; `Objective.loss`: the loss function
    4. algorithm/loss.py      `PolicyLoss`: loss per token, with the surrogate that the config names

Start reading at `loop.py`, which has the whole step. `run.py` opens the run folder and resumes, `build.py` constructs
the objects, and `phases.py` is the only caller of sleep, wake, offload and reload.
"""
