"""The peers' side of `workers.Worker`: JSON lines in, JSON lines out, until stdin ends.

Scripts here run in an environment of their own and import nothing of ours but this file.
"""

import json
import os
import sys

_ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # what libraries print from here on must not come between the answers


def line(error):
    """An exception in one line of at most 200 characters."""
    lines = str(error).strip().splitlines() or ["(no message)"]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def serve(functions):
    """Answers each request {"do": name, …} with the dict of functions[name](…)."""
    for line in sys.stdin:
        request = json.loads(line)
        answer = functions[request.pop("do")](**request)
        _ANSWERS.write(json.dumps(answer) + "\n")
        _ANSWERS.flush()
