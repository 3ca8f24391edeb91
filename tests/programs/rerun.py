"""Runs all programs again in this process, and prints whether each takes the course of its first run.

``python -m programs.rerun FOLDER NAMESPACE``; the folder has a cache and a course, as JSON, for each program.
Programs that make request ids of hashes, which differ in this process, get a namespace of their own.
"""

import json
import sys
from pathlib import Path

from programs.examples import PROGRAMS
from programs.harness import Course, Setting, difference, play

folder, namespace = Path(sys.argv[1]), sys.argv[2]
for name, program in PROGRAMS.items():
    first = Course(**json.loads((folder / f"{name}.json").read_text()))
    own = f"{namespace} with other ids" if program.own_ids else namespace
    again = play(program.run, folder / name, Setting(seed=1, namespace=own))
    print(f"{name}: {difference(first, again) or 'the same'}")  # noqa: T201 - the test reads it
