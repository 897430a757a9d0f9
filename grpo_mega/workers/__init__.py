"""Worker processes of rewards and environments: their start, limits and messages.

`json_worker` is the parent's side and `worker_main` the child's side of one worker process. They exchange lines of JSON
over a socket pair. `time_limit` ends a job that takes too long. None imports torch, so a worker starts in a fraction of
a second.
"""
