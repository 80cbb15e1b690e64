"""`ray job submit -- python jobs/train.py ...`: the same as `raysemi train ...`, on the job's cluster."""

from __future__ import annotations

import sys

from raysemi.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
