"""cast-serve as a vLLM plugin: `register` is the `vllm.general_plugins` entry point."""


def register() -> None:
    """Register the quantization method `cast` with vLLM.

    vLLM calls this in every process it starts (front end, engine core, workers, model inspection),
    so it is idempotent and imports inside: importing `cast_serve` loads neither torch nor vllm.
    """
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    if "cast" in QUANTIZATION_METHODS:
        return
    from cast_serve.config import CastConfig
    from cast_serve.logs import join_vllm

    join_vllm()
    register_quantization_config("cast")(CastConfig)
