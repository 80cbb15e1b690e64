"""All jobs on a real cluster of three nodes: `python tests/cluster.py` in its small form."""

from __future__ import annotations

import sys

import pytest
from cluster import Size, walk

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]  # on a busy machine a head alone takes a minute


@pytest.mark.skipif(sys.platform != "linux", reason="nodes have 127.0.0.2 to 4, which Linux alone has by itself")
def test_every_job_and_what_is_refused() -> None:
    walk(Size())
