"""--vary of cast-train compare: one flag at a time takes other values, all others stay as given.

How a method answers to lambda, eta, n or warm-up is found with short runs before a long one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import get_type_hints

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.config_checks import METHODS_OF, key_of
from cast_serve.trainer.errors import RunError

_GROUPS = ("method", "budget", "optimizer")
# Named by flags of compare's own, or what runs must share to be compared.
_FIXED = ("method", "initial_mask", "start", "lr", "lambda", "pattern", "context")


@dataclass(frozen=True, kw_only=True)
class Variation:
    """One flag with another value; `key` as in YAML, `value` as on the command line."""

    key: str
    value: str

    @property
    def flags(self) -> list[str]:
        return ["--" + self.key.replace("_", "-"), self.value]

    @property
    def name(self) -> str:
        """As a part of a folder's name."""
        return f"{self.key.replace('_', '')}{self.value}"


def rule_of(method: str) -> str:
    """What trains: fixed-mask of fixed-mask:wanda."""
    return method.partition(":")[0]


def parse_variations(texts: Sequence[str], methods: Sequence[str]) -> list[Variation]:
    """Those of ["eta=0.3,0.9", "warmup=0"], in that order.

    Args:
        methods: that are trained.

    Raises:
        RunError: not KEY=VALUE, a key that cannot be varied, or a value twice; says what can be.
    """
    found: list[Variation] = []
    for text in texts:
        key, equals, values = text.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        if not equals or not values:
            raise RunError(f"vary: {text!r} gives no values; write --vary {key}=VALUE,VALUE")
        if key not in _keys():
            raise RunError(f"vary: {key!r} cannot be varied; known: {', '.join(_keys())}")
        of = METHODS_OF.get(key)
        others = [m for m in methods if of is not None and rule_of(m) not in of]
        if of is not None and others:
            some = ",".join(m for m in methods if m not in others) or ",".join(of)
            raise RunError(
                f"vary: {key} is of {', '.join(of)} alone, not of {', '.join(others)}; give "
                f"--methods {some}"
            )
        found += [Variation(key=key, value=value) for value in values.split(",")]
    if len(set(found)) < len(found):
        raise RunError("vary: a value is given twice")
    return found


def _keys() -> list[str]:
    hints = get_type_hints(RunConfig)
    keys = [
        key_of(option.name)
        for option in fields(RunConfig)
        if option.metadata["group"] in _GROUPS and hints[option.name] is not bool
    ]
    return [key for key in keys if key not in _FIXED]
