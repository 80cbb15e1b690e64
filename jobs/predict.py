"""`ray job submit -- python jobs/predict.py ...`: the same as `raysemi predict ...`, in the job's own process.

With `--shards --workers N` the cluster's workers predict, and take the GPUs: the job's process needs none. RUN, --pool
and --out are then absolute paths that all nodes share, or URLs (not --out).

Otherwise Ray gives that process a GPU only when asked: `--entrypoint-num-gpus 1`. Several ranks of one machine, each
with its part of the images: `ray job submit --entrypoint-num-gpus 4 -- torchrun --nproc-per-node 4 jobs/predict.py
...`.
"""

from __future__ import annotations

import sys

from raysemi.cli import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
