"""`python -m qprobe`: the command line."""

from qprobe.cli import main

if __name__ == "__main__":
    main()
