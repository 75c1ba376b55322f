"""cast-train compare: every method on the same model, data and token budget.

main      the command: from flags to runs
jobs      what a run is, and of which methods
vary      other values of a flag, as runs
runs      carrying runs out, one after the other or several at once
answers   what cast-train evaluate says of their checkpoints
results   rows, results.json and results.md
plots     the plots
"""
