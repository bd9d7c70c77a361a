"""``only=`` and ``skip=``: which modules of a model the caller means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

__all__ = ["Selection"]


class Selection:
    """The modules that may be touched: at or below one that ``only`` names, and neither at nor below one of ``skip``.

    Args:
        only: a module's path, a glob over paths, a class, or several of these; ``None`` for the whole model.
        skip: the same, for what to leave alone.

    Raises:
        TypeError: for anything else.
        ValueError: for a path or glob that no module has.
    """

    def __init__(self, model: nn.Module, only: Any = None, skip: Any = None) -> None:
        modules = list(model.named_modules(remove_duplicate=False))
        self._only = None if only is None else _at_or_below(modules, "only", only)
        self._skip = set() if skip is None else _at_or_below(modules, "skip", skip)

    def problem(self, module: nn.Module) -> str | None:
        """Why ``module`` may not be touched, or ``None``."""
        if module in self._skip:
            return "is named by skip="
        if self._only is not None and module not in self._only:
            return "is not named by only="
        return None


def _at_or_below(modules: list[tuple[str, nn.Module]], argument: str, selectors: Any) -> set[nn.Module]:
    single = isinstance(selectors, (str, type)) or not isinstance(selectors, Iterable)
    named: set[nn.Module] = set()
    for selector in [selectors] if single else selectors:
        found = list(_matching(modules, argument, selector))
        if isinstance(selector, str) and not found:
            raise ValueError(f"{argument}: the model has no module {selector!r}")
        named.update(found)
    return {below for module in named for below in module.modules()}


def _matching(modules: list[tuple[str, nn.Module]], argument: str, selector: Any) -> Iterator[nn.Module]:
    if isinstance(selector, str):
        return (m for path, m in modules if path == selector or fnmatchcase(path, selector))
    if isinstance(selector, type):
        return (m for _, m in modules if isinstance(m, selector))
    raise TypeError(f"{argument} takes paths, globs and classes, got {type(selector).__name__}")
