"""What vLLM users turn on, as options of the engine process (engine_worker.py)."""

from typing import Any

# 60 tokens, in which n-grams repeat.
LONG = [11, 42, 42, 7, 300, 12, 44, 190, 77, 3] * 6
OTHER = [5, 6, 7, 8, 9, 10] * 5

FEATURES: dict[str, dict[str, Any]] = {
    # Prompts are cut into pieces of 32 tokens at most, in batches with the other's decode steps.
    "chunked prefill": {
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 8,
        "rounds": [[LONG, OTHER, LONG[::-1]]],
    },
    # The second round begins as the first did, and finds that cached.
    "prefix caching": {
        "enable_prefix_caching": True,
        "block_size": 32,
        "rounds": [[LONG, OTHER], [[*LONG, 21, 22], [*OTHER, 21]]],
    },
    "asynchronous scheduling": {"async_scheduling": True},
    "speculative decoding": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
        "rounds": [[LONG, OTHER]],
        "max_tokens": 24,
    },
}
