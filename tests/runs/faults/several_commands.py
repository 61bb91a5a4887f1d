"""`ept` commands one after another in one process, as JSON in the first argument: its imports are paid for once."""

from __future__ import annotations

import json
import sys

from ept.cli.main import app
from ept.runs.processes import exit_rank


def main(commands: list[list[str]]) -> None:
    for command in commands:
        try:
            app(command)
        except SystemExit as end:
            if end.code:
                exit_rank(end)
                raise
    exit_rank(SystemExit(0))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
