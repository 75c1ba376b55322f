"""What cast-train compare asks of each checkpoint beside the run's own perplexity.

OUTPUT/NAME.evaluation.json         found: as cast-train evaluate prints it; asked: of what
OUTPUT/untouched.evaluation.json    of the dense model
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cast_serve.kernels.user_cache import write_whole
from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.errors import RunError

UNTOUCHED = "untouched"

# Of a batch: what a model that must make its logits whole has room for beside a large vocabulary.
_TOKENS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Files as `cast-train evaluate` takes them: --text, each as one text, and --zero-shot."""

    text: tuple[Path, ...] = ()
    zero_shot: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.zero_shot)

    def check(self) -> None:
        """Refuse before hours of work what would be refused after them.

        Raises:
            RunError: a text that is no file or an empty one, or a file without items.
        """
        from cast_serve.trainer.evaluation.choices import read_items

        for path in self.text:
            if not path.is_file():
                raise RunError(f"text: {path} is no file")
            if not path.stat().st_size:
                raise RunError(f"text: {path} is empty")
        for path in self.zero_shot:
            read_items(path)


def evaluate_once(questions: Questions, model: Path, name: str, config: RunConfig) -> None:
    """Keep beside the run's output, as `name`, what `model` answers; once of the same files.

    Weights in fp32, windows of the run's context.

    Raises:
        RunError: a text shorter than a window, or a choice longer than the model.
    """
    target = _path(config.output.parent, name)
    asked = _asked(questions, model, config)
    if target.is_file() and json.loads(target.read_text(encoding="utf-8"))["asked"] == asked:
        return
    from cast_serve.trainer.evaluation.evaluate import Request, evaluate

    found = evaluate(
        Request(
            model=model,
            text=questions.text,
            zero_shot=questions.zero_shot,
            context=config.context if questions.text else None,
            device=config.device,
            batch_size=max(1, _TOKENS // (config.context or 1024)),
        )
    )
    write_whole(target, (json.dumps({"asked": asked, "found": found}) + "\n").encode())


def read_answers(folder: Path, name: str) -> dict[str, Any]:
    """`text` and `zero_shot` of what was found for `name` of the comparison in `folder`."""
    content = json.loads(_path(folder, name).read_text(encoding="utf-8"))
    return {kind: content["found"][kind] for kind in ("text", "zero_shot")}


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.evaluation.json"


def _asked(questions: Questions, model: Path, config: RunConfig) -> dict[str, Any]:
    """What the answers depend on. A checkpoint that is written anew has other times."""
    weights = sorted(model.glob("*.safetensors"))
    return {
        kind: [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in paths]
        for kind, paths in (("text", questions.text), ("zero_shot", questions.zero_shot))
    } | {
        "context": config.context,
        "weights": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights],
    }
