"""`python -m benchmarks`: hands over to the command line in cli.py."""

from benchmarks.cli import app

if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
