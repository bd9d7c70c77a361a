"""In hypothesis's place where it is not installed, as on a machine with a GPU.

The tests by random cases are skipped, and the other tests of their files run. A package on the path, for torch._dynamo
looks for it by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

__all__ = ["Anything", "given", "settings"]

_REASON = "needs hypothesis, which is not installed"


class Anything:
    """Strategies are made as files are imported, and drawn from by nobody."""

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Anything:
        return self

    def __or__(self, other: Any) -> Anything:
        return self

    def __iter__(self) -> Iterator[Anything]:
        return iter(())


class _Settings(Anything):
    """A decorator that changes nothing, however it is made."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and inspect.isfunction(args[0]) else self


def given(*strategies: Any, **named: Any) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    def decorate(test: Callable[..., Any]) -> Callable[..., None]:
        @pytest.mark.skip(reason=_REASON)
        def skipped(**kwargs: Any) -> None: ...

        # The arguments that remain are fixtures' and parameters'.
        parameters = [p for p in inspect.signature(test).parameters.values() if p.name not in named]
        kept = parameters[: len(parameters) - len(strategies)]
        skipped.__signature__ = inspect.Signature(kept)
        skipped.__name__, skipped.__module__, skipped.__doc__ = test.__name__, test.__module__, test.__doc__
        skipped.pytestmark = [*skipped.pytestmark, *getattr(test, "pytestmark", [])]
        return skipped

    return decorate


settings = _Settings()


def __getattr__(name: str) -> Anything:
    return getattr(Anything(), name)
