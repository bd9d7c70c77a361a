"""``python -m tools.gpu.build_in_place ROOT``: ``setup.py build_ext --inplace`` without ``pyproject.toml``.

An older setuptools refuses that file, though it builds the library well.
"""

from __future__ import annotations

import os
import runpy
import sys

import setuptools

if __name__ == "__main__":
    os.chdir(sys.argv[1])
    given = {}
    setuptools.setup = given.update
    runpy.run_path("setup.py", run_name="__main__")
    distribution = setuptools.Distribution({"name": "fusedres"})
    command = given["cmdclass"]["build_ext"](distribution)
    command.inplace = True
    command.run()
