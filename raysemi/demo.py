"""`make demo`: draws a data set, trains with and without the unlabeled images, compares.

Both runs have the same network, the same labeled images in the same order, as many steps, and the same averaging of
weights; they differ in the unlabeled images alone.
"""

from __future__ import annotations

from pathlib import Path

from raysemi import config_io
from raysemi.config import RayConfig
from raysemi.data.pack import pack
from raysemi.data.sources import open_source
from raysemi.launch.cluster import connected, cores
from raysemi.launch.terminal import Bar, print_results, train_with_progress
from raysemi.report.page import build_report

LABELED = 24
"""Labeled images; the other train images are the unlabeled pool."""
RECIPES = {
    "scenes-supervised": ["method.average.kind=period"],  # derprop's momentum network is such an average
    "scenes-derprop": [],
}


def run_demo(folder: Path, workers: int) -> None:
    """Draws, packs, trains each recipe on Ray, prints the table and where the report is.

    Args:
        folder: where `pools/scenes` and `runs/demo-...` go; what is finished there is not done again.
        workers: Ray workers.
    """
    pools = folder / "pools" / "scenes"
    with Bar("images") as bar:
        # Masks of the unlabeled images are kept to show, in the report, how good the pseudo-labels are.
        pack(open_source("scenes"), pools, split=LABELED, keep_unlabeled_masks=True, progress=bar)
    shared = [
        f"data.pools={pools}",
        f"ray.num_workers={workers}",
        f"ray.cpus_per_worker={max(1, cores() // workers)}",
        "eval.pseudo_images=16",
        "train.period=15",  # both average alike: by itself a period follows the pool, and these differ in theirs
    ]
    configs = [
        config_io.load(recipe, [*shared, f"run={folder / 'runs' / recipe.replace('scenes', 'demo')}", *own])
        for recipe, own in RECIPES.items()
    ]
    results = {}
    with connected(RayConfig(num_workers=workers)):  # one cluster for both: starting one takes a while
        for config in configs:
            results[config.run] = train_with_progress(config)
    print_results(results)
    print(f"report: {build_report(list(results), folder / 'runs' / 'demo-report.html')}")
