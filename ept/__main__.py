"""`python -m ept`: the command line, also as what `torchrun -m` and `accelerate launch -m` start."""

from .cli.main import app

if __name__ == "__main__":
    app()
