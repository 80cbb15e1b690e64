"""`ray job submit -- python jobs/index.py ...`: the same as `raysemi index ...`, over all machines of its cluster.

All of them must reach the pool under the same name. `--ray none` and `--processes` keep the work on this machine.
"""

from __future__ import annotations

import sys

from raysemi.cli import main

if __name__ == "__main__":
    main(["index", "--ray", "auto", *sys.argv[1:]])
