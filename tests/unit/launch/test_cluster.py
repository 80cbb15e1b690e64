"""Starting Ray on a busy machine."""

from __future__ import annotations

import pytest

from raysemi.config import RayConfig
from raysemi.errors import RaysemiError
from raysemi.launch import cluster

SLOW = Exception("The current node timed out during startup. This could happen because some of the raylet failed.")


@pytest.mark.parametrize(("failures", "dashboard", "tries"), [(2, False, 3), (9, False, 3), (9, True, 1)])
def test_ray_is_given_more_than_its_30_seconds(
    monkeypatch: pytest.MonkeyPatch, failures: int, dashboard: bool, tries: int
) -> None:
    import ray

    tried: list[object] = []

    def init(**how: object) -> None:
        tried.append(how["address"])
        if len(tried) <= failures:
            raise SLOW

    monkeypatch.setattr(ray, "init", init)
    if failures < tries:
        cluster._init(RayConfig(), None, own=True, include_dashboard=dashboard)
    else:
        with pytest.raises(RaysemiError, match="Ray must start on this machine; got Exception: The current node timed"):
            cluster._init(RayConfig(), None, own=True, include_dashboard=dashboard)
    assert tried == ["local"] * tries


def test_a_cluster_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    tried: list[object] = []

    def init(**how: object) -> None:
        tried.append(how["address"])
        raise ConnectionError("refused")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RaysemiError, match=r"Ray must answer at head:1; got ConnectionError: refused\."):
        cluster._init(RayConfig(), "head:1", own=False)
    assert tried == ["head:1"]
