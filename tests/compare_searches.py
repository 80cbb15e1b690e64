"""TPE against random search: one sweep by both, with the same budget of trials, over several seeds of the search.

Run again it goes on. Nothing is pruned or repeated, and the recipes do not count as first trials: what differs is the
search alone.

    python tests/compare_searches.py short-runs --seeds 3 --trials 24 --out sweeps/searches \
        set.data.pools=pools/scenes
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

from raysemi.tune.study import read

SEARCHES = ("random", "tpe")
FIXED = ("search.defaults_first=false", "prune.name=none", "repeat.seeds=0")


def best_so_far(folder: Path, trials: int) -> list[float]:
    """Largest mIoU, percent, among the first 1, 2, ... trials by number; a failed one adds nothing."""
    reached = [-1.0 if one.state != "finished" or one.miou is None else one.miou for one in read(folder)[1]]
    if len(reached) != trials:
        raise SystemExit(f"{folder} must hold {trials} trials; got {len(reached)}. Run the same command again.")
    return list(accumulate(reached, max))


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="YAML file, or a sweep's name")
    parser.add_argument("overrides", nargs="*", help="of the sweep, a.b=value")
    parser.add_argument("--seeds", type=int, default=5, help="of the search")
    parser.add_argument("--trials", type=int, default=24, help="of each search and seed")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweeps")
    given = parser.parse_intermixed_args()
    curves: dict[str, list[list[float]]] = {name: [] for name in SEARCHES}
    for seed in range(given.seeds):
        for name in SEARCHES:  # in turns: a machine that slows down slows both
            folder = given.out / f"{name}-{seed}"
            own = (f"search.name={name}", f"search.seed={seed}", f"search.trials={given.trials}")
            line = [sys.executable, "-m", "raysemi.cli", "tune", "run", given.sweep, *FIXED, *own, *given.overrides]
            subprocess.run([*line, "--out", str(folder)], check=True, env=os.environ, stdout=sys.stderr)
            curves[name].append(best_so_far(folder, given.trials))
    print(json.dumps({"sweep": given.sweep, "overrides": given.overrides, "best_so_far": curves}))
    print("| trials | best mIoU so far, " + " | ".join(SEARCHES) + " | tpe above random, by seed |")
    print("|---" * (len(SEARCHES) + 2) + "|")
    for count in dict.fromkeys((*(n for n in (1, 3, 6, 12, 24, 48) if n < given.trials), given.trials)):
        at = {name: [curve[count - 1] for curve in of_seeds] for name, of_seeds in curves.items()}
        above = ", ".join(f"{ours - other:+.2f}" for ours, other in zip(at["tpe"], at["random"], strict=True))
        print(f"| {count} | " + " | ".join(mean_and_spread(values) for values in at.values()) + f" | {above} |")


if __name__ == "__main__":
    main()
