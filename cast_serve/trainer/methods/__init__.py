"""The training methods: CAST, and what it is compared with on the same model, data and budget.

    cast         AdamS, weight scaling, dense forward; pruned at the end       arXiv 2509.25996
    dense        nothing is sparse: the control, dense continued on the same tokens
    fixed-mask   one mask, chosen before training; pruned weights stay zero
    sr-ste       masked forward, mask refreshed every step, constant decay      arXiv 2102.04010
    ast          SR-STE with an annealed decay and a mask kept for an interval  arXiv 2407.20584

A method decides the layers, the optimizer and the strength of the decay. Loss, data, schedule and
clipping are the trainer's, the same for all.
"""

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.methods.base import Method
from cast_serve.trainer.methods.baselines import Ast, Dense, FixedMask, SrSte
from cast_serve.trainer.methods.cast import Cast

METHODS: dict[str, type[Method]] = {
    "cast": Cast,
    "dense": Dense,
    "fixed-mask": FixedMask,
    "sr-ste": SrSte,
    "ast": Ast,
}


def method_of(config: RunConfig) -> Method:
    """The method that `config` names."""
    return METHODS[config.method](config)
