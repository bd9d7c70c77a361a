"""``python -m fusedres explain MODEL``: what :func:`fusedres.patch` would do to a model, with nothing changed."""

from __future__ import annotations

import hashlib
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from . import models
from .patch import explain
from .zoo import LIBRARIES, build

__all__ = ["add_arguments", "load_model", "run"]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help=f"a network of fusedres.models ({', '.join(models.NETWORKS)}); library:name, with "
        f"{', '.join(LIBRARIES)} for libraries; or package.module:callable or path/to/file.py:callable, called without "
        "arguments for the model",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--source", metavar="PATH", help="print the generated forward of the module at PATH")


def run(args: Namespace) -> int:
    try:
        model = load_model(args.model)  # which the report does not keep alive
        report = explain(model)
        print(report.source(args.source) if args.source is not None else report.to_json() if args.json else report)
    except (ValueError, KeyError) as error:
        print(f"fusedres explain: {error.args[0]}", file=sys.stderr)
        return 2
    return 0


def load_model(name: str) -> nn.Module:
    """The model that ``name`` stands for.

    Raises:
        ValueError: where there is no such model, with the reason.
    """
    if name in models.NETWORKS:
        return getattr(models, name)(fused=False)
    place, separator, path = name.rpartition(":")
    if not separator or not path:
        raise ValueError(
            f"{name!r} is none of {', '.join(models.NETWORKS)}, nor of the form library:name, package.module:callable "
            "or path/to/file.py:callable"
        )
    return build(name) if place in LIBRARIES else _called(name, _found(name, place, path))


def _found(name: str, place: str, path: str) -> Any:
    """What ``path`` names in the file or module ``place``."""
    try:
        found = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except Exception as error:  # the user's code runs here, and may raise anything
        raise ValueError(f"{name} cannot be imported: {_in_words(error)}") from error
    return found


def _module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return import_module(name)


def _module_of_file(path: Path) -> ModuleType:
    """The file as a module, which finds its neighbours as it does when it is run."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = f"{path.stem}_{hashlib.sha1(folder.encode()).hexdigest()[:8]}"
    spec = spec_from_file_location(name, path)
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _called(name: str, factory: Callable[[], Any] | nn.Module) -> nn.Module:
    if isinstance(factory, nn.Module):
        return factory
    try:
        model = factory()
    except TypeError as error:
        raise ValueError(f"{name} cannot be called without arguments: {_in_words(error)}") from error
    except Exception as error:  # as above
        raise ValueError(f"{name} raises {_in_words(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} gives a {type(model).__name__}, not an nn.Module")
    return model


def _in_words(error: Exception) -> str:
    kind = type(error).__name__
    known = isinstance(error, (ImportError, AttributeError, ValueError, TypeError)) and not isinstance(
        error, UnicodeError
    )
    return str(error) if known else f"{kind}: {error}"
