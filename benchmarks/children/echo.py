"""Answers each request at once: the same as `echo.pl`, in Python."""

import json
import sys

for line in sys.stdin:
    answer = {"id": json.loads(line)["id"], "status": "ok"}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
