"""Command lines: each module is one subcommand of `grpo-mega` and the file of the same name in `tools/`.

A command parses its arguments, calls the package and prints; it holds no logic that another module needs. Exit codes:
0 done, 2 the input is wrong (one message, no traceback), 1 a failure of the program or the machine. Start reading at
`main.py`, which lists the subcommands.
"""
