"""A run from the command line, that many tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from makers import call, tiny_run

from raysemi import config_io


@pytest.fixture(scope="session")
def recipe(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a run of two steps on the drawn pools."""
    folder = tmp_path_factory.mktemp("cli")
    config = tiny_run(scenes, folder / "run", "fixmatch", "train.steps=2")
    path = folder / "two-steps.yaml"
    path.write_text(config_io.dump(config), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(recipe: Path) -> Path:
    """The run folder after `raysemi train`."""
    result = call("train", recipe)
    assert result.exit_code == 0, result.output
    assert "mIoU" in result.output
    return recipe.parent / "run"
