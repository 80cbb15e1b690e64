"""`ray job submit -- python jobs/evaluate.py ...`: the same as `raysemi evaluate ...`, in the job's own process.

Ray gives that process a GPU only when asked: `--entrypoint-num-gpus 1`. Several ranks of one machine, each with its
part of the images: `ray job submit --entrypoint-num-gpus 4 -- torchrun --nproc-per-node 4 jobs/evaluate.py ...`.
"""

from __future__ import annotations

import sys

from raysemi.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
