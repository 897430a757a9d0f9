r"""Find the final answer of a text: boxes, lines behind `####`, "the answer is x" and the statement at the end.

Rewards call `finder.find_final_answer` and decide by their own rules what a statement is worth: `gsm8k` reads numbers,
`math` reads formulas. Nothing here knows the reference.
"""
