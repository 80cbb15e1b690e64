"""`python -m raysemi` is the command `raysemi`: what torchrun starts."""

from raysemi.cli import main

if __name__ == "__main__":
    main()
