"""`ray job submit -- python jobs/evaluate.py ...`: the same as `raysemi evaluate ...`, on the job's cluster."""

from __future__ import annotations

import sys

from raysemi.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
