"""``python -m fusedres explain MODEL``: what :func:`fusedres.patch` would do to a model, with nothing changed."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from importlib import import_module

from torch import nn

from . import models
from .patch import explain

__all__ = ["add_arguments", "load_model", "run"]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help=f"a network of fusedres.models ({', '.join(models.NETWORKS)}), or package.module:callable, "
        "called without arguments for the model",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--source", metavar="PATH", help="print the generated forward of the module at PATH")


def run(args: Namespace) -> int:
    try:
        report = explain(load_model(args.model))
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
    factory = _factory(name)
    try:
        model = factory()
    except TypeError as error:
        raise ValueError(f"{name} cannot be called without arguments: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} gives a {type(model).__name__}, not an nn.Module")
    return model


def _factory(name: str) -> Callable[[], nn.Module]:
    if name in models.NETWORKS:
        return lambda: getattr(models, name)(fused=False)
    module_name, separator, path = name.partition(":")
    if not separator:
        raise ValueError(f"{name!r} is none of {', '.join(models.NETWORKS)}, nor of the form package.module:callable")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = import_module(module_name)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be imported: {error}") from error
    return found
