"""Rules that join components, and which numbers of ranks a run can be spread over."""

from __future__ import annotations

import re
from typing import Any

import pytest

from raysemi.config import RayConfig, RunConfig, broken_rules, check_world, fitting_workers, spread_of
from raysemi.config_shares import uses_unlabeled
from raysemi.errors import ConfigError


def config(**changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "run": "runs/a",
        "data": {"labeled": "p/l", "unlabeled": "p/u", "val": "p/v"},
        "method": {"name": "fixmatch"},
        "train": {"steps": 50, "batch": {"labeled": 6, "unlabeled": 12}},
        "ray": "none",
    }
    return RunConfig.model_validate(tree | changes)


def refused(**changes: Any) -> str:
    with pytest.raises(ValueError, match=" must ") as caught:
        config(**changes)
    return str(caught.value)


def test_defaults_stand_and_the_tree_is_frozen() -> None:
    made = config()
    assert isinstance(config(ray={}).ray, RayConfig)
    with pytest.raises(ValueError, match="frozen"):
        made.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_a_world_that_divides_both_batches_is_accepted(world: int) -> None:
    check_world(config(), world)


def test_a_world_that_does_not_divide_is_refused_with_the_next_batch_that_works() -> None:
    with pytest.raises(ConfigError) as caught:
        check_world(config(), 4)
    labeled, unlabeled = caught.value.faults
    assert labeled.startswith("train.batch.labeled must be divisible by the number of ranks, 4; got 6. Set it to 8")
    assert unlabeled.startswith("train.batch.unlabeled must be divisible by twice the number of ranks, 2 x 4")
    assert "got 12. Set it to 16" in unlabeled


def test_more_ranks_than_labeled_images_of_a_step_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch\.labeled must be divisible by the number of ranks, 12; got 6"):
        check_world(config(), 12)


def test_elastic_workers_begin_and_end_with_a_number_that_fits() -> None:
    made = config(ray={"num_workers": [1, 6]})
    assert isinstance(made.ray, RayConfig)
    assert fitting_workers(made, made.ray) == [1, 2, 3, 6]
    assert (made.ray.min_workers, made.ray.max_workers) == (1, 6)
    assert "got [2, 5], of which fit: 2, 3. Change it, or the batches: train.batch.labeled must be" in refused(
        ray={"num_workers": [2, 5]}
    )
    assert "must be [min, max] with min at most max; got [3, 2]" in refused(ray={"num_workers": [3, 2]})
    assert "num_workers" in refused(ray={"num_workers": [0, 2]})


def test_an_odd_share_would_tear_a_cutmix_pair() -> None:
    odd = {"steps": 50, "batch": {"labeled": 4, "unlabeled": 6}}
    check_world(config(train=odd), 1)
    with pytest.raises(ConfigError, match=r"mixed in pairs; got 6\. Set it to 8"):
        check_world(config(train=odd), 2)
    check_world(config(train=odd, method={"name": "supervised"}), 2)  # no unlabeled image in the batch


def test_images_of_a_group_stay_on_one_rank() -> None:
    def grouped(unlabeled: int, **method: Any) -> RunConfig:
        train = {"steps": 50, "batch": {"labeled": 6, "unlabeled": unlabeled}}
        return config(train=train, method={"name": "u2pl", "warmup_periods": 0} | method)

    check_world(grouped(12), 3)
    check_world(grouped(2), 1)  # by default 4, or all where they are fewer
    check_world(grouped(9, group=3), 3)  # pairs need not stand together
    with pytest.raises(ConfigError, match=r"method\.group must divide .*got 4 \(the default\).*method\.group=3 or"):
        check_world(grouped(12), 2)
    check_world(grouped(12, group=2), 2)
    with pytest.raises(ConfigError, match=r"method\.group must .*got 4"):
        check_world(grouped(6), 1)


def test_ray_workers_are_checked_when_the_config_is_read() -> None:
    assert "number of ranks, 5; got 6" in refused(ray={"num_workers": 5})
    config(ray={"num_workers": 3})


def test_one_labeled_image_alone_cannot_pass_batch_norm() -> None:
    """The decoder's pooled branch is one value a channel and image; GPUs join ranks, other images join the pass."""
    one = {"steps": 50, "batch": {"labeled": 2, "unlabeled": 12}}
    alone: dict[str, Any] = {"train": one, "method": {"name": "supervised"}}
    with pytest.raises(ConfigError, match=r"at least 2 images.*got 1\. Set it to 4.*model\.batch_norm=frozen"):
        check_world(config(**alone), 2)
    assert "at least 2 images" in refused(**alone, ray={"num_workers": 2, "use_gpu": False})
    config(**alone, ray={"num_workers": 2})  # may become GPUs: told when the cluster is known
    check_world(config(**alone), 2, gpu=True)
    check_world(config(**alone), 1)
    check_world(config(**alone, model={"batch_norm": "frozen"}), 2)
    check_world(config(train=one), 2)
    u2pl: dict[str, Any] = {"name": "u2pl", "group": 2}
    check_world(config(train=one, method=u2pl | {"warmup_periods": 0}), 2)
    with pytest.raises(ConfigError, match="at least 2 images"):
        check_world(config(train=one, method=u2pl), 2)  # begins with the labeled images alone
    single: dict[str, Any] = alone | {"train": {"steps": 50, "batch": {"labeled": 1}}}
    with pytest.raises(ConfigError, match="at least 2 images"):
        check_world(config(**single), 1, gpu=True)  # no other GPU to join
    only_labeled = {"labeled": "p/l", "val": "p/v"}
    with pytest.raises(ConfigError, match="at least 2 images"):
        check_world(config(train=one, data=only_labeled, method={"name": "derprop"}), 2)


U2PL = {"name": "u2pl", "group": 2, "warmup_periods": 0}
OHEM = {"name": "fixmatch", "criterion": {"name": "ohem"}}


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "world", "method", "sizes"),
    [
        (6, 12, 1, {"name": "fixmatch"}, [6, 4, 2]),  # 6 parts at most, of pairs
        (6, 12, 2, {"name": "fixmatch"}, [2]),
        (6, 12, 3, {"name": "fixmatch"}, [2]),
        (5, 10, 1, {"name": "fixmatch"}, [2]),
        (6, 12, 1, {"name": "mean_teacher"}, [6, 4, 2]),
        (12, 12, 1, {"name": "mean_teacher"}, [6, 4, 3, 2, 1]),
        (12, 12, 1, {"name": "augseg"}, [4]),
        (12, 12, 1, U2PL, [6, 4, 2]),
        (12, 4, 1, {"name": "supervised"}, [6, 4, 3, 2]),  # of one, BatchNorm's pooled branch cannot be normalised
        (6, 12, 1, OHEM, [6, 4, 2]),
    ],
)
def test_a_micro_batch_is_one_that_could_be_a_rank(
    labeled: int, unlabeled: int, world: int, method: dict[str, Any], sizes: list[int]
) -> None:
    def run(size: int | None) -> RunConfig:
        batch = {"labeled": labeled, "unlabeled": unlabeled}
        return config(train={"steps": 50, "batch": batch, "micro_batch": size}, method=method)

    share = (labeled if method["name"] == "supervised" else unlabeled) // world
    assert spread_of(run(None), world).smaller() == sizes
    assert spread_of(run(sizes[0]), world).smaller() == sizes[1:]
    for size in range(1, 2 * share):
        if size >= share or size in sizes:
            check_world(run(size), world)
        else:
            with pytest.raises(
                ConfigError, match=rf"train\.micro_batch must split .* {share} images.* got {size}\."
            ) as e:
                check_world(run(size), world)
            assert f"Set it to {' or '.join(map(str, sizes))} or null." in str(e.value)


def test_what_is_of_a_ranks_whole_share_is_not_split() -> None:
    train = {"steps": 50, "batch": {"labeled": 4, "unlabeled": 8}, "micro_batch": 4}
    local: list[tuple[str, dict[str, Any]]] = [
        ("method.criterion.scope", {"name": "fixmatch", "criterion": {"name": "ohem", "scope": "local"}}),
        ("method.entropy_scope", U2PL | {"entropy_scope": "local"}),
    ]
    for setting, method in local:
        made = config(train=train, method=method)
        with pytest.raises(ConfigError, match=f"micro_batch must be null with {setting}=local.* set {setting}=global"):
            check_world(made, 1)
        check_world(made, 2)  # where it is all of the share
        assert spread_of(made, 1).smaller() == []
    assert "train.micro_batch must split" in refused(train=train | {"micro_batch": 3}, ray={"num_workers": 1})


def test_single_is_for_one_rank() -> None:
    made = config(train={"steps": 50, "strategy": "single", "batch": {"labeled": 6, "unlabeled": 12}})
    check_world(made, 1)
    with pytest.raises(ConfigError, match=r"train\.strategy must be ddp on 2 ranks; got single"):
        check_world(made, 2)


def test_stop_at_lies_within_the_run() -> None:
    assert "train.stop_at must be at most train.steps (50); got 51" in refused(train={"steps": 50, "stop_at": 51})
    config(train={"steps": 50, "stop_at": 50})


def test_pools_are_required_where_the_method_reads_them() -> None:
    faults = refused(data={})
    for name in ("labeled", "val", "unlabeled"):
        assert f"data.{name} must name a pool" in faults
    only_labeled = {"labeled": "p/l", "val": "p/v"}
    assert "data.unlabeled must name a pool for method fixmatch" in refused(data=only_labeled)
    config(data=only_labeled, method={"name": "supervised"})
    full = config(data=only_labeled, method={"name": "derprop"})  # the paper's row with all labels
    assert not uses_unlabeled(full.method, full.data)


def test_a_method_says_whether_it_uses_the_unlabeled_pool() -> None:
    assert uses_unlabeled(config().method, config().data)
    assert uses_unlabeled(config(method={"name": "u2pl"}).method, config().data)  # without strong views
    assert not uses_unlabeled(config(method={"name": "supervised"}).method, config().data)


def test_two_gradients_need_two_sides() -> None:
    for name in ("pareto", "fixed"):
        text = refused(method={"name": "supervised"}, gradients={"name": name})
        assert "gradients.name must be uniform, since all terms of method supervised are supervised" in text
        assert f"there is no second gradient; got {name}. Set gradients=uniform, or another method." in text
    measured = refused(method={"name": "supervised"}, gradients={"measure_every": 5})
    assert "gradients.measure_every must be 0" in measured
    assert "got 5" in measured
    only_labeled = {"labeled": "p/l", "val": "p/v"}
    text = refused(data=only_labeled, method={"name": "derprop"}, gradients={"name": "pareto"})
    assert "a run without unlabeled images" in text
    assert "or data.unlabeled" in text
    text = refused(data=only_labeled, gradients={"name": "pareto"})
    assert "gradients" not in text  # what is missing is the pool
    assert config(gradients={"name": "pareto", "measure_every": 5}).gradients.meo


@pytest.mark.parametrize(
    "url",
    ["s3://KEY:SECRET@bucket/runs", "s3://bucket/runs?secret_key=abc", "s3://bucket/a?region=x&access_key=abc"],
)
def test_a_secret_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    text = broken_rules({"run": url})
    assert len(text) == 1
    assert text[0].startswith("run must not hold a password")
    assert url not in text[0]
    assert broken_rules({"run": "s3://bucket/runs?region=eu-west-1"}) == []
    assert broken_rules({"data": {"unlabeled": ("pools/a", url)}})[0].startswith("data.unlabeled must not hold")


def test_all_broken_rules_come_at_once() -> None:
    text = refused(
        run="s3://a:b@c/d", data={"labeled": "p/l"}, train={"steps": 3, "stop_at": 4}, ray={"num_workers": 3}
    )
    for part in ("run must", "data.val must", "data.unlabeled must", "train.stop_at must", "train.batch.labeled must"):
        assert part in text


def test_statistics_of_its_own_need_passes_in_train_mode() -> None:
    own = {"average": {"kind": "ema", "buffers": "own"}}
    assert "method.average.buffers must be averaged for method fixmatch" in refused(method={"name": "fixmatch"} | own)
    config(method={"name": "u2pl"} | own)


def test_rank_weighting_needs_pseudo_labels_partners_and_channels() -> None:
    rank = {"name": "rank"}
    assert "weighting.name must be none, since method supervised" in refused(
        weighting=rank, method={"name": "supervised"}
    )
    derprop = {"name": "derprop", "cutmix": {"partner": "second_view"}}
    assert "method.cutmix.partner must be pair with weighting rank" in refused(weighting=rank, method=derprop)
    assert "weighting.k must be at most model.channels, 8; got 9" in refused(
        weighting=rank | {"k": 9}, model={"channels": 8}
    )
    eval_mode = {"name": "unimatch", "compat": {"partner_eval": True}}
    assert "method.compat.partner_eval must be false with weighting rank" in refused(weighting=rank, method=eval_mode)
    alone = {"labeled": "p/l", "val": "p/v"}
    assert "in a run without unlabeled images" in refused(weighting=rank, method={"name": "derprop"}, data=alone)
    config(weighting=rank, method={"name": "derprop"})


def test_what_mixes_nothing_may_have_odd_shares() -> None:
    odd = {"steps": 50, "batch": {"labeled": 6, "unlabeled": 3}}
    check_world(config(train=odd, method={"name": "mean_teacher"}), 3)
    with pytest.raises(ConfigError, match=r"divisible by the number of ranks, 2; got 3\. Set it to 4"):
        check_world(config(train=odd, method={"name": "mean_teacher"}), 2)
    with pytest.raises(ConfigError, match="twice the number of ranks"):
        check_world(config(train=odd, method={"name": "fixmatch"}), 1)


def test_a_group_that_is_mixed_stays_on_one_rank() -> None:
    def made(unlabeled: int, group: int | None = None) -> RunConfig:
        batch = {"labeled": 12, "unlabeled": unlabeled}
        return config(train={"steps": 50, "batch": batch}, method={"name": "augseg", "group": group})

    for world, unlabeled, group in ((1, 12, None), (3, 12, None), (1, 2, None), (1, 3, None), (2, 6, 3), (2, 10, 5)):
        check_world(made(unlabeled, group), world)
    for world, unlabeled, group, text in (
        (2, 4, None, r"got 4 \(the default\) for train\.batch\.unlabeled=4 on 2 ranks\. Set method\.group=2 or train\."
                     r"batch\.unlabeled=8"),
        (2, 12, None, r"method\.group=3 or train\.batch\.unlabeled=16"),
        (1, 9, 4, r"got 4 for train\.batch\.unlabeled=9 on 1 rank\. Set method\.group=3 or"),
        (1, 1, None, r"Set train\.batch\.unlabeled=2\."),
        (2, 2, 2, r"Set train\.batch\.unlabeled=4\."),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"method\.group must divide the unlabeled images of each rank") as caught:
            check_world(made(unlabeled, group), world)
        assert re.search(text, str(caught.value)), caught.value


DPT = {"name": "dpt", "encoder": "vit_small_patch14_dinov2"}


def test_a_transformer_needs_crops_and_windows_of_whole_patches() -> None:
    pools = {"labeled": "p/l", "unlabeled": "p/u", "val": "p/v"}
    windows = {"mode": "sliding_window", "window": 801}
    text = refused(model=DPT, data=pools, eval=windows)
    assert "data.crop must be a multiple of 14, the patches of vit_small_patch14_dinov2; got 321. Set it to 322" in text
    assert (
        "eval.window must be a multiple of 14, the patches of vit_small_patch14_dinov2; got 801. Set it to 812" in text
    )
    config(model=DPT, data=pools | {"crop": 518}, eval=windows | {"window": 798})
    config(data=pools | {"crop": 321}, eval=windows)


def test_what_a_transformer_lacks_is_told_with_all_other_faults() -> None:
    """Its width is known before it is made: 64 channels of the small one's decoder, 128 of the base one's."""
    pools = {"labeled": "p/l", "unlabeled": "p/u", "val": "p/v", "crop": 518}
    rank, u2pl = {"name": "rank", "k": 65}, {"name": "u2pl", "auxiliary_weight": 0.4}
    text = refused(model=DPT, data=pools | {"crop": 321}, weighting=rank, method=u2pl, train={"steps": 3, "stop_at": 4})
    for part in (
        "weighting.k must be at most the width of dpt with vit_small_patch14_dinov2, 64; got 65. Lower it, or take a "
        "larger encoder.",
        "method.auxiliary_weight must be 0 with vit_small_patch14_dinov2, which has no map before its last; got 0.4",
        "data.crop must be a multiple of 14",
        "train.stop_at must",
    ):
        assert part in text
    behind = {"name": "corrmatch", "corr": {"from": "aspp"}}
    assert "method.corr.from must be encoder, fusion or classifier with dpt" in refused(
        model=DPT, data=pools, method=behind
    )
    config(data=pools, method=behind)
    base = DPT | {"encoder": "vit_base_patch14_dinov2.lvd142m"}
    config(model=base, data=pools, weighting=rank, method=u2pl | {"auxiliary_weight": 0.0})
    config(data=pools, weighting=rank, method=u2pl)  # a convolutional network has 256 channels, and that map


def test_ranks_that_leave_nothing_to_teach_are_told_when_the_config_is_read() -> None:
    u2pl = {"name": "u2pl", "contrast": {"low_rank": 20}}
    assert "low_rank must be less than high_rank, 20; got 20" in refused(method=u2pl)


def test_a_second_view_leaves_no_pair_to_be_torn() -> None:
    odd = {"steps": 50, "batch": {"labeled": 6, "unlabeled": 3}}
    for name in ("derprop", "corrmatch"):
        second = {"name": name, "cutmix": {"partner": "second_view"}}
        for world in (1, 3):
            check_world(config(train=odd, method=second), world)
        with pytest.raises(ConfigError, match=r"divisible by the number of ranks, 2; got 3\. Set it to 4"):
            check_world(config(train=odd, method=second), 2)
        with pytest.raises(ConfigError, match="twice the number of ranks"):
            check_world(config(train=odd, method={"name": name}), 3)


def test_a_network_without_batchnorm_trains_with_one_image_a_rank() -> None:
    one = {"steps": 50, "batch": {"labeled": 2, "unlabeled": 4}}
    pools = {"labeled": "p/l", "val": "p/v", "crop": 518}
    method = {"name": "supervised"}
    check_world(config(model=DPT, data=pools, method=method, train=one), 2)
    with pytest.raises(ConfigError, match="at least 2 images, since BatchNorm"):
        check_world(config(data=pools, method=method, train=one), 2)
