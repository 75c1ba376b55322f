"""lm-eval's tasks on a model that is already in memory: lm-eval does everything but loading."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cast_serve.trainer.errors import RunError

# name of a task or group: {"acc,none": 0.5, "acc_stderr,none": 0.1, ...}
TaskResults = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks that lm-eval knows, and its `TaskManager`, which knows them."""

    names: list[str]
    manager: Any


def find_tasks(names: Sequence[str], *, include_path: Path | None) -> Tasks:
    """lm-eval's tasks of these names, before any model is loaded for them.

    Args:
        include_path: folder of further task files (YAML).

    Raises:
        RunError: the `eval` extra is not installed, or a task is unknown.
    """
    if find_spec("lm_eval") is None:
        raise RunError("tasks: needs lm-eval; install it: pip install 'cast-serve[eval]'")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise RunError(
            f"tasks: lm-eval knows no {', '.join(unknown)}; `lm-eval ls tasks` lists what it "
            "knows, --include-path adds a folder of task files"
        )
    return Tasks(names=list(names), manager=manager)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    batch_size: int,
    limit: int | None,
) -> TaskResults:
    """Numbers of lm-eval's `tasks` by the keys that it gives them.

    Args:
        limit: first items of each task; None for all.

    Raises:
        RunError: data that cannot be loaded.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=tasks.names,
            task_manager=tasks.manager,
            limit=limit,
            log_samples=False,
        )
    # Datasets come from the hub or from files of the task: OSError covers both.
    except (OSError, ValueError) as error:
        raise RunError(f"tasks: lm-eval failed on {', '.join(tasks.names)}: {error}") from error
    assert found is not None, "only ranks other than 0 get None"
    return {
        task: {key: value for key, value in numbers.items() if isinstance(value, float)}
        for task, numbers in found["results"].items()
    }
