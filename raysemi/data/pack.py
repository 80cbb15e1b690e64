"""Turn a source into pools: `labeled/`, `unlabeled/` and `val/`.

The shards are planned first (keys in order, a fixed number of samples each), then every shard is one task, so that the
bytes do not depend on how many processes work, or on which machines. What is wrong is collected and told by name. The
index and `pool.json` come last: a folder without them is unfinished, and the same command goes on with it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raysemi.data.choose import POOLS, choose_entries, file_stats, raise_faults, same_images
from raysemi.data.paths import AnyPath, StorePath, as_path, remove_folder, store_config
from raysemi.data.pool import FORMAT_VERSION, INDEX_FILE, POOL_FILE, Pool
from raysemi.data.shard import PARTS, Entry, ShardPlan, Stat, fingerprint, finish_pool, write_shard
from raysemi.data.sources import Source
from raysemi.data.splits import split_origin
from raysemi.data.workers import Runner, run_tasks
from raysemi.errors import ConfigError, DataError, DataFailure

SHARD_SAMPLES = 256
"""Samples a shard: a pool of 10,000 images then spans more shards than the mixing window of the order needs."""

_FAULTS_WANTED = 20
_SEEN_WITHIN_S = 90.0
"""A network disk may show a file that another machine wrote as late as this."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PoolPlan:
    """One pool to write: its shards in order, and a name for what they will hold."""

    name: str
    folder: AnyPath
    shards: tuple[ShardPlan, ...]
    plan: str
    samples: int


def pack(
    source: Source,
    out: str | AnyPath,
    *,
    split: str | int | None = None,
    pools: Sequence[str] = POOLS,
    processes: int | None = None,
    shard_samples: int = SHARD_SAMPLES,
    keep_unlabeled_masks: bool = False,
    escape_dots: bool = False,
    allow_same_images: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    run: Runner | None = None,
) -> dict[str, Pool]:
    """Write the pools of a source.

    Args:
        source: from `sources.open_source`.
        out: folder, local or URL; each pool becomes a folder in it.
        split: which train images are labeled: name, file or number (`splits.labeled_keys`); None: all with a mask.
        pools: which of labeled, unlabeled, val to write.
        processes: default: one a CPU core. The bytes written do not depend on it.
        shard_samples: samples a shard.
        keep_unlabeled_masks: store the masks of unlabeled images, for measuring alone.
        escape_dots: replace dots in keys by `_` instead of refusing them.
        allow_same_images: accept images with the same bytes in two pools.
        seed: of the draw when `split` is a number.
        progress: called with (samples done, samples in all).
        run: does the work in place of processes of this machine, on others too; all of them must reach the source and
            `out` under the same names.

    Returns:
        The pools by name.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the source, the split, the disk or the store; the text holds up to 20 faults. Finished shards stay,
            and the same call goes on with them.
    """
    _check_arguments(pools, processes, shard_samples)
    folder = as_path(out)
    folder = folder.absolute() if isinstance(folder, Path) else folder
    do = run or partial(run_tasks, processes=processes, preload=("raysemi.data.shard", "webdataset"))
    chosen = choose_entries(
        source,
        split=split,
        pools=pools,
        keep_unlabeled_masks=keep_unlabeled_masks,
        escape_dots=escape_dots,
        seed=seed,
    )
    stats = file_stats(chosen)
    if not allow_same_images:
        raise_faults(same_images(chosen, stats, do))
    settings = _settings(source, shard_samples)
    plans = [_plan(name, folder, chosen[name], stats, settings, shard_samples) for name in POOLS if name in pools]
    open_plans = [plan for plan in plans if not _complete(plan)]
    for plan in open_plans:
        _prepare(plan)
    _check_space(open_plans, stats)

    total = sum(plan.samples for plan in plans)
    done = total - sum(plan.samples for plan in open_plans)
    faults: list[tuple[str, tuple[str, ...]]] = []
    if progress is not None:
        progress(done, total)
    tasks = [shard for plan in open_plans for shard in plan.shards]
    more = False
    with closing(do(partial(write_shard, source), tasks)) as results:
        for count, (shard, result) in enumerate(results, start=1):
            done += result.samples
            if result.faults:
                faults.append((str(shard), result.faults))
            if progress is not None:
                progress(done, total)
            if sum(len(texts) for _, texts in faults) >= _FAULTS_WANTED and count < len(tasks):
                more = True
                break
    raise_faults([text for _, texts in sorted(faults) for text in texts], more)

    made: dict[str, Any] = {"source": type(source).__name__.lower()}
    made |= split_origin(split, root=source.root, standard=source.standard, seed=seed)
    if recipe := getattr(source, "recipe", None):
        made["recipe"] = recipe
    for plan in open_plans:
        about = {**made, "plan": plan.plan}
        patience = _SEEN_WITHIN_S if run else 0.0
        finish_pool(plan.folder, plan.shards, source.classes, source.palette, about, patience)
    return {plan.name: Pool.open(str(plan.folder), store=store_config(plan.folder)) for plan in plans}


def _check_arguments(pools: Sequence[str], processes: int | None, shard_samples: int) -> None:
    faults = []
    if not pools or set(pools) - set(POOLS):
        faults.append(f"--pools must be of {', '.join(POOLS)}; got {', '.join(pools) or 'none'}. Correct the names.")
    if processes is not None and processes < 1:
        faults.append(f"--processes must be at least 1; got {processes}. Raise it.")
    if shard_samples < 1:
        faults.append(f"--shard-samples must be at least 1; got {shard_samples}. Raise it.")
    if faults:
        raise ConfigError(faults)


def _settings(source: Source, shard_samples: int) -> str:
    """What besides the files decides the bytes; without paths, so that it is the same on another machine."""
    own = {name: value for name, value in source.__getstate__().items() if not isinstance(value, AnyPath)}  # type: ignore[attr-defined]
    return repr((FORMAT_VERSION, type(source).__name__, source.classes, source.palette, shard_samples, own))


def _plan(
    name: str, out: AnyPath, entries: Sequence[Entry], stats: Mapping[AnyPath, Stat], settings: str, shard_samples: int
) -> PoolPlan:
    shards = []
    for number, start in enumerate(range(0, len(entries), shard_samples)):
        own = tuple(entries[start : start + shard_samples])
        shards.append(ShardPlan(out / name / f"{name}-{number:06d}.tar", own, fingerprint(settings, own, stats)))
    # a copy of the data set has other times: the finished pool is known by names and sizes
    plan = fingerprint(settings, entries, {path: (size, 0) for path, (size, _) in stats.items()})
    return PoolPlan(name, out / name, tuple(shards), plan, len(entries))


def _complete(plan: PoolPlan) -> bool:
    """Whether this very pool is there already; refuses to touch another one."""
    if not (plan.folder / POOL_FILE).exists():
        return False
    if Pool.open(str(plan.folder), store=store_config(plan.folder)).made.get("plan") != plan.plan:
        raise DataError(
            f"{plan.folder} must be free for this pool; got another finished pool there. Choose another --out or "
            f"remove the folder."
        )
    remove_folder(plan.folder / PARTS)
    return True


def _prepare(plan: PoolPlan) -> None:
    """Make the pool's folder; of an interrupted run with another plan, remove what does not belong to this one."""
    own = re.compile(rf"{plan.name}-\d{{6}}\.tar(\.part)?|{re.escape(INDEX_FILE)}|{re.escape(PARTS)}|.*\.parquet\.part")
    planned = {shard.path.name for shard in plan.shards}
    try:
        present: list[AnyPath] = [*plan.folder.iterdir()] if plan.folder.exists() else []
        foreign = [path.name for path in present if not own.fullmatch(path.name)]
        if foreign or (present and not (plan.folder / PARTS).is_dir()):
            raise DataError(
                f"{plan.folder} must be empty or hold an unfinished pool; got {(foreign or [present[0].name])[0]}. "
                f"Choose another --out."
            )
        for path in present:
            if path.is_file() and path.name not in planned:
                path.unlink()
        (plan.folder / PARTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{plan.folder} must be writable; got {error}. Choose another --out.") from error


def _check_space(plans: Sequence[PoolPlan], stats: Mapping[AnyPath, Stat]) -> None:
    if not plans or isinstance(plans[0].folder, StorePath):
        return
    missing = [shard for plan in plans for shard in plan.shards if not shard.part.exists()]
    needed = sum(stats[entry.item.image][0] for shard in missing for entry in shard.entries if entry.item.image)
    free = shutil.disk_usage(plans[0].folder).free
    if needed > free:
        raise DataFailure(
            f"the disk of {plans[0].folder.parent} must have room for {needed / 1e9:.1f} GB; got {free / 1e9:.1f} GB. "
            f"Free some space or choose another --out."
        )
