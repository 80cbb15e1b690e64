"""Others that `bench data` times: each reads every image once, and makes what the stream makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysemi.bench import rivals


@pytest.mark.parametrize("rival", ["webdataset", "folder"])
@pytest.mark.parametrize("processes", [0, 2])
def test_others_read_every_image_of_the_pool(pool, tmp_path, rival, processes, monkeypatch):
    source = rivals.PREPARED[rival](pool, tmp_path, 9, 4)
    seen = []
    monkeypatch.setattr(rivals, "_length", lambda batch: seen.append(batch) or len(batch[0]))
    with source(processes, 0) as batches:
        assert sum(batches) == 24
    images = torch.cat([batch[0] for batch in seen])
    assert images.shape == (24, 9, 9, 3)
    assert images.dtype == torch.uint8
    labels = torch.cat([batch[2] for batch in seen])
    assert labels.shape == (24, 9, 9)
    assert len(np.unique(images.numpy().reshape(24, -1), axis=0)) > 20
