"""AdamS (CAST, Algorithm 1 and Eq. 7-8).

optimizer        the optimizer: parameter groups, state, shards of a weight
rule             the rule as it is written, which CPUs run
fused            the same on an NVIDIA GPU, one launch a parameter group
triton_kernels   what that launches
"""
