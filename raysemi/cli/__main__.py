"""`python -m raysemi.cli` is the command `raysemi`."""

from raysemi.cli import main

if __name__ == "__main__":
    main()
