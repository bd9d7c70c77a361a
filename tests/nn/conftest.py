"""Gives each test of a block's contract the shapes that its class names."""

from __future__ import annotations

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.cls is not None and "shape" in metafunc.fixturenames:
        shapes = metafunc.cls.shapes
        metafunc.parametrize("shape", shapes.values(), ids=shapes.keys())
