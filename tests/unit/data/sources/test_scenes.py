from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from raysemi.data.sources import open_source
from raysemi.data.sources.scenes import CLASSES, PALETTE, Scenes, draw_scene
from raysemi.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(0, "train", index, size=64) for index in range(120)]


def test_an_image_depends_on_seed_part_and_index_alone():
    first = draw_scene(3, "train", 5, size=48)
    again = draw_scene(3, "train", 5, size=48)
    assert np.array_equal(first.image_HW3, again.image_HW3)
    assert np.array_equal(first.label_HW, again.label_HW)
    for other in (draw_scene(4, "train", 5, 48), draw_scene(3, "val", 5, 48), draw_scene(3, "train", 6, 48)):
        assert not np.array_equal(first.image_HW3, other.image_HW3)


def test_no_two_images_are_equal(scenes):
    assert len({scene.image_HW3.tobytes() for scene in scenes}) == len(scenes)
    assert len({scene.label_HW.tobytes() for scene in scenes}) == len(scenes)


def test_every_class_occurs_often_enough_to_be_learned(scenes):
    labels = np.stack([scene.label_HW for scene in scenes])
    counts = np.bincount(labels.ravel(), minlength=len(CLASSES))
    assert len(counts) == len(CLASSES) == len(PALETTE) == 7
    shares = counts / counts.sum()
    assert 0.5 < shares[0] < 0.85
    assert shares[1:].min() > 0.015
    images_with = [(labels == k).any(axis=(1, 2)).mean() for k in range(1, 7)]
    assert min(images_with) > 0.3  # and is absent from many
    assert max(images_with) < 0.8


def test_the_mask_is_the_outline_at_any_resolution(scenes):
    # drawn finer, then reduced to the class with the most pixels in each cell: differs only where an edge is met
    for index in range(4):
        fine = draw_scene(0, "train", index, size=256).label_HW
        cells = fine.reshape(64, 4, 64, 4).transpose(0, 2, 1, 3).reshape(64, 64, 16)
        votes = np.stack([(cells == k).sum(axis=-1) for k in range(7)])
        assert (votes.argmax(axis=0) == scenes[index].label_HW).mean() > 0.985
        pure = votes.max(axis=0) == 16
        assert (votes.argmax(axis=0) == scenes[index].label_HW)[pure].mean() > 0.998  # shadows round to whole pixels


def test_the_outline_is_where_the_image_changes(scenes):
    # a mask shifted by two pixels would lose this: edges of the image lie on edges of the mask
    def edge_strength(shift: int) -> float:
        total = 0.0
        for scene in scenes[:40]:
            grey = scene.image_HW3.mean(axis=-1)
            slope = np.abs(np.diff(grey, axis=1))
            border = np.diff(np.roll(scene.label_HW, shift, axis=1).astype(int), axis=1) != 0
            total += slope[:, 4:-4][border[:, 4:-4]].mean()
        return total

    assert edge_strength(0) > 1.5 * max(edge_strength(2), edge_strength(-2))


def test_colour_hints_at_the_class_and_does_not_tell_it(scenes):
    def bins_and_labels(part):
        image = np.stack([scene.image_HW3 for scene in part]).reshape(-1, 3) // 32
        label = np.concatenate([scene.label_HW.ravel() for scene in part])
        return image @ np.array([64, 8, 1]), label

    def recall(predicted, label):
        return np.mean([(predicted[label == k] == k).mean() for k in range(7)])

    bins, label = bins_and_labels(scenes[:90])
    votes = np.zeros((512, 7))
    np.add.at(votes, (bins, label), 1 / np.bincount(label, minlength=7)[label])  # each class counts the same
    held_out_bins, held_out_label = bins_and_labels(scenes[90:])
    assert recall(votes.argmax(axis=1)[bins], label) > 1.3 / 7  # the histogram does fit what it has seen
    assert recall(votes.argmax(axis=1)[held_out_bins], held_out_label) < 2.5 / 7  # a hint, no more


def test_as_a_source_it_gives_images_and_masks_that_belong_together():
    source = open_source("scenes", None, train=3, val=2, seed=7, size=40)
    train, val = source.items("train"), source.items("val")
    assert (len(train), len(val)) == (3, 2)
    assert len({item.key for item in (*train, *val)}) == 5
    assert all(item.has_mask for item in train)
    suffix, data = pickle.loads(pickle.dumps(source)).image_bytes(train[2])
    assert suffix == "jpg"
    assert (suffix, data) == source.image_bytes(train[2])
    drawn = draw_scene(7, "train", 2, size=40)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - drawn.image_HW3).mean() < 8  # the grain costs some
    mask = source.mask(train[2])
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, drawn.label_HW)


def test_wrong_settings_are_refused():
    with pytest.raises(DataError, match=r"--root must be left out for source scenes, which is drawn; got somewhere\."):
        Scenes("somewhere")
    with pytest.raises(ConfigError) as caught:
        Scenes(train=0, size=8)
    assert len(caught.value.faults) == 2
    assert "size must be at least 32; got 8." in str(caught.value)
