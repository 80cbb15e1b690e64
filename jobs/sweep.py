"""`ray job submit -- python jobs/sweep.py SWEEP --out DIR ...`: the same as `raysemi tune run`, over its cluster.

DIR and the pools are absolute paths that all nodes share; a PostgreSQL database (`storage=postgresql://HOST/NAME`)
keeps the trials where DIR is on a file system without locks.
"""

from __future__ import annotations

import sys

from raysemi.cli import main

if __name__ == "__main__":
    main(["tune", "run", "--ray", "auto", *sys.argv[1:]])
