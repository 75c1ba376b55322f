"""Makes sure that vLLM will find this package as a plugin, in every process that it starts."""

import importlib.metadata
import os

GROUP = "vllm.general_plugins"
NAME = "cast"


def require() -> None:
    """Check that the plugin is found and registers.

    vLLM itself only logs a plugin that fails, and then dies with "Unknown quantization method".

    Raises:
        RuntimeError: what is in the way, and what to do.
    """
    found = [entry for entry in importlib.metadata.entry_points(group=GROUP) if entry.name == NAME]
    if not found:
        raise RuntimeError(
            f"no installed package has the {GROUP} entry point {NAME!r}, so vLLM would not find "
            "the plugin; install cast-serve with pip, a source folder on PYTHONPATH is not enough"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        # An allow-list: without the name, vLLM would skip the plugin and say nothing.
        os.environ["VLLM_PLUGINS"] = ",".join(filter(None, [allowed, NAME]))
    try:
        found[0].load()()
    except ImportError as error:
        raise RuntimeError(f"the vLLM plugin cannot be imported: {error}") from error
    from vllm.model_executor.layers.quantization import get_quantization_config

    registered = get_quantization_config(NAME)
    if registered.__module__ != "cast_serve.config":
        raise RuntimeError(
            f"another plugin has registered the quantization method {NAME!r}: "
            f"{registered.__module__}.{registered.__qualname__}"
        )
