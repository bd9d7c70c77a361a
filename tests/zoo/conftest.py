"""Puts ``tests/`` on the path, for the helpers that several folders of tests share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
