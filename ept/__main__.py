"""`python -m ept`: the command line, also for `torchrun -m` and `accelerate launch -m`."""

from .cli.main import app
from .runs.processes import exit_rank

if __name__ == "__main__":
    try:
        app()
    except SystemExit as end:
        exit_rank(end)
        raise
