"""`ept` commands one after another in one process, as JSON in the first argument: its imports are paid for once."""

from __future__ import annotations

import json
import sys

from ept.cli.main import app


def main(commands: list[list[str]]) -> None:
    for command in commands:
        try:
            app(command)
        except SystemExit as end:
            if end.code:
                raise


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
