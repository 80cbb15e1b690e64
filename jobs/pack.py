"""`ray job submit -- python jobs/pack.py ...`: the same as `raysemi pack ...`, in the job's own process.

It starts `--processes` more, all on the machine that the job runs on.
"""

from __future__ import annotations

import sys

from raysemi.cli import main

if __name__ == "__main__":
    main(["pack", *sys.argv[1:]])
