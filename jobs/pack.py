"""`ray job submit -- python jobs/pack.py ...`: the same as `raysemi pack ...`, on the job's cluster."""

from __future__ import annotations

import sys

from raysemi.cli import main

if __name__ == "__main__":
    main(["pack", *sys.argv[1:]])
