r"""Compare final answers of mathematics: LaTeX or plain text, exactly where possible, without deleting characters.

`final_answer.py` extracts the answer of a completion, `tokens.py` splits it into tokens, `expressions.py` and
`answers.py` parse all tokens or none, `exact.py` and `numeric.py` compute expressions modulo a prime or with many
digits, and `equality.py` decides. docs/rewards.md states the rules.

Invariants: a text with one token that cannot be parsed is compared token by token, so nothing is dropped silently
(tests/unit/rewards/math_answers/test_expressions.py); no operation depends on the size of a number that an answer names
(tests/unit/rewards/math_answers/test_exact.py).
"""
