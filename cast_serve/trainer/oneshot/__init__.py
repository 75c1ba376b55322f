"""One-shot pruning, the baselines that CAST's training is measured against.

command     cast-train prune
run         from a dense checkpoint to a pruned one
prune       magnitude, Wanda and SparseGPT on a model in memory
wanda       the score of Wanda
sparsegpt   the prune and update of SparseGPT
"""
