"""``python stand_in.py TOOL COMMAND...``: in compute-sanitizer's place where there is no GPU, for a dry run.

It runs the command, and ends as compute-sanitizer does: with its summary, and with its status where the command failed.
"""

from __future__ import annotations

import subprocess
import sys

if __name__ == "__main__":
    status = subprocess.run(sys.argv[2:]).returncode
    if sys.argv[1] == "racecheck":
        print("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
    else:
        print("========= ERROR SUMMARY: 0 errors")
    sys.exit(status)
