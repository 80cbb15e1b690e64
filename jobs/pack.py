"""`ray job submit -- python jobs/pack.py ...`: the same as `raysemi pack ...`, over all machines of the job's cluster.

This process plans, writes the index and shows how far the work is; the images go through Ray's workers, one a CPU. All
machines must reach `--root` and `--out` under the same names: URLs, or a folder that they share. `--ray none` and
`--processes` keep the work on this machine.
"""

from __future__ import annotations

import sys

from raysemi.cli import main

if __name__ == "__main__":
    main(["pack", "--ray", "auto", *sys.argv[1:]])
