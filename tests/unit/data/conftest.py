"""Small pools, written byte by byte with tarfile so that the readers are tested against the format, not the packer."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import fs

from raysemi.data.pool import Pool, Shard
from raysemi.data.write_pool import write_index


def jpeg(seed: int, height: int, width: int) -> bytes:
    noise = np.random.Generator(np.random.Philox(key=seed)).integers(0, 256, (height // 6 + 1, width // 6 + 1, 3))
    stream = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).resize((width, height)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def png(mask: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="session")
def make_pool() -> Callable[..., Pool]:
    """make_pool(folder, count, ...) -> the open pool; `change(key, files)` may damage the files of a sample."""

    def make(
        folder: Any,
        count: int = 13,
        *,
        masks: bool = True,
        shard_samples: int = 5,
        filesystem: fs.FileSystem | None = None,
        change: Callable[[str, dict[str, bytes]], None] | None = None,
        classes: Sequence[str] = ("sky", "road", "car"),
    ) -> Pool:
        where = filesystem or fs.LocalFileSystem()
        where.create_dir(str(folder), recursive=True)
        rows: list[dict[str, Any]] = []
        shards = []
        for first in range(0, count, shard_samples):
            name, stream = f"p-{first // shard_samples:06d}.tar", io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as tar:
                for i in range(first, min(first + shard_samples, count)):
                    key, height, width = f"city/{i:03d}", 40 + i, 60 - i
                    labels = np.random.Generator(np.random.Philox(key=i)).integers(0, len(classes), (height, width))
                    files = {"jpg": jpeg(i, height, width)}
                    if masks:
                        files["mask.png"] = png(np.where(labels == 2, 255, labels))
                    if change is not None:
                        change(key, files)
                    places = {}
                    for suffix, payload in files.items():
                        member = tarfile.TarInfo(f"{key}.{suffix}")
                        member.size = len(payload)
                        places[suffix] = (stream.tell() + 512, len(payload))
                        tar.addfile(member, io.BytesIO(payload))
                    image, mask = places["jpg"], places.get("mask.png", (None, None))
                    rows.append(
                        {"key": key, "shard": name, "image_offset": image[0], "image_bytes": image[1],
                         "mask_offset": mask[0], "mask_bytes": mask[1], "height": height, "width": width,
                         "class_pixels": None}
                    )  # fmt: skip
            content = stream.getvalue()
            with where.open_output_stream(f"{folder}/{name}") as out:
                out.write(content)
            samples = sum(row["shard"] == name for row in rows)
            shards.append(Shard(name, samples, len(content), hashlib.sha256(content).hexdigest()))
        palette = [(9 * i, 0, 0) for i in range(len(classes))]
        write_index(where, str(folder), rows=rows, shards=shards, classes=classes, palette=palette)
        return Pool.open(str(folder), filesystem)

    return make
