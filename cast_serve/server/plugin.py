"""Makes sure that vLLM will find this package as a plugin, in every process that it starts."""

import importlib.metadata
import os
import sys

GROUP = "vllm.general_plugins"
# What endpoints.py adds to the API server; since vLLM 0.26.
ENDPOINTS = "vllm.endpoint_plugins"
# Those that vLLM loads all of, unless VLLM_PLUGINS names some.
LOADED_UNASKED = (
    GROUP,
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
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
    allow()
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
    if missing := why_no_endpoints():
        _warn(f"no page, no /v1/cast/info and no cast_serve_* metrics: {missing}")


def why_no_endpoints() -> str | None:
    """Why vLLM will not load endpoints.py; None if it will."""
    from vllm import __version__, plugins

    if not hasattr(plugins, "load_endpoint_plugins"):
        return f"vLLM {__version__} has no endpoint plugins, 0.26 and later do"
    if NAME not in importlib.metadata.entry_points(group=ENDPOINTS).names:
        return f"the installed package has no {ENDPOINTS} entry point; install it anew"
    return None


def _warn(reason: str) -> None:
    print(f"cast-serve: {reason}", file=sys.stderr, flush=True)


def allow() -> None:
    """Put this plugin on the list VLLM_PLUGINS, without which vLLM loads no endpoints.

    Where there is no list, all that vLLM would load without one goes on it too.
    """
    given = os.environ.get("VLLM_PLUGINS")
    if given is not None:
        allowed = [name for name in given.split(",") if name]
    else:
        entries = importlib.metadata.entry_points()
        allowed = sorted(
            {name for group in LOADED_UNASKED for name in entries.select(group=group).names}
        )
        also = sorted(entries.select(group=ENDPOINTS).names & set(allowed) - {NAME})
        if also:
            # A list is one for all groups.
            _warn(
                f"routes of other plugins are served too: {', '.join(also)}; "
                "VLLM_PLUGINS can name the plugins to load"
            )
    if NAME not in allowed:
        allowed.append(NAME)
    os.environ["VLLM_PLUGINS"] = ",".join(allowed)
