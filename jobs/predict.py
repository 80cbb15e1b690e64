"""`ray job submit -- python jobs/predict.py ...`: the same as `raysemi predict ...`, on the job's cluster."""

from __future__ import annotations

import sys

from raysemi.cli import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
