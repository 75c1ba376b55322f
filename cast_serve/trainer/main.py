"""cast-train: the command. Errors a user can put right are one line on stderr and exit status 2."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from cast_serve.trainer.arguments import parse
from cast_serve.trainer.errors import RunError

_EXTRA = ("accelerate", "datasets", "tensorboard", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cast-train; returns its exit status."""
    from rich.console import Console

    # highlight=False: rich would colour parts of numbers and paths.
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        config = parse(arguments)
        missing = [name for name in _EXTRA if find_spec(name) is None]
        if missing:
            raise RunError(
                f"training needs {', '.join(missing)}; install it: pip install 'cast-serve[train]'"
            )
        # Here, because transformers takes seconds to import and --help must not wait for it.
        from transformers.utils.logging import disable_progress_bar

        from cast_serve.model_loaders.errors import CheckpointError
        from cast_serve.trainer.train import run

        # Bars of loading and of every checkpoint's shards would break up the one of the steps.
        disable_progress_bar()
        try:
            run(config, Console(highlight=False))
        except CheckpointError as error:
            raise RunError(str(error)) from error
    except RunError as error:
        errors.print(f"cast-train: error: {error}", markup=False)
        return 2
    except KeyboardInterrupt:
        errors.print(
            "cast-train: interrupted; "
            "if OUTPUT.run exists, --resume continues from its last checkpoint"
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
