from collections.abc import Callable, Iterator

import pytest

from cast_serve.kernels import op, selection
from cast_serve.kernels.selection import known_plan, plan_for, warm, warm_ahead


@pytest.fixture
def forget_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """No plan is known and none is forced; call it to forget again."""

    def forget() -> None:
        for cached in (known_plan, plan_for, warm, warm_ahead, op.routes):
            cached.cache_clear()
        selection._begun.clear()

    monkeypatch.delenv("CAST_SERVE_KERNEL", raising=False)
    forget()
    yield forget
    forget()


@pytest.fixture
def empty_user_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """No plan is on disk. Compiled kernels are not there either: not for tests of many kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
