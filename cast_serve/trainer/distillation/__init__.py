"""Distillation from the dense model (CAST, Eq. 13).

loss            the loss of hidden states or of logits, in chunks of tokens
block           loss and gradient on one chunk of logits
triton_kernel   the same in one kernel
liger           the loss through Liger-Kernel, an alternative
teacher         where the teacher lives
teacher_cache   its most likely tokens on disk, in its place
"""
