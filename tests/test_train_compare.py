"""Differences are paired, their intervals hold what they promise, and no gain is said as such."""

from __future__ import annotations

import math
import re
import statistics

import pytest
import torch
from numerics import DIFFERS, assert_close64
from torch import Tensor

from pacswap.errors import DataError
from pacswap.train.measure.compare import Comparison, Difference, compare, points, span
from pacswap.train.measure.metrics import MEASURES, Scores, scores_of
from pacswap.train.measure.statistics import (
    Interval,
    percentile_interval,
    resampled,
    t_interval,
    t_quantile,
)

CLASSES = ("sky", "road", "pole")
BELOW_0, AROUND_0, ABOVE_0 = Interval(-0.02, -0.01), Interval(-0.01, 0.02), Interval(0.01, 0.02)


def population(count: int, *, gain: float = 0.0, noise: float = 0.08, seed: int = 0) -> Tensor:
    """Tallies [count, 2, 8, 3] of pictures: hard and easy ones, for both networks alike."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    truth = (200 + 2000 * draw(count, 1, 3)).round()
    ease = 0.55 + 0.3 * draw(count, 1, 1)
    shift = torch.tensor([0.0, gain], dtype=torch.float64)[:, None]
    hits = (truth * (ease + shift + noise * (draw(count, 2, 3) - 0.5))).clamp(min=0).round()
    hits = hits.minimum(truth.expand_as(hits))
    seen = (hits + 0.2 * truth).round()
    truth = truth.expand_as(hits)
    rows = [hits, truth, seen, hits // 3, truth // 3, seen // 3, hits // 5, truth // 4]
    return torch.stack(rows, 2).long()


def scores(tallies: Tensor, classes: tuple[str, ...] = CLASSES) -> Scores:
    names = tuple(f"picture {i}" for i in range(len(tallies)))
    return Scores(classes, names, tallies, torch.zeros(len(classes), len(classes)).long())


def arms(seeds: int = 3, count: int = 40, **options) -> tuple[dict[int, Scores], dict[int, Scores]]:
    """Scores by seed: same pictures, other errors."""
    control, upgraded = {}, {}
    for seed in range(1, seeds + 1):
        first = population(count, **options)
        first[:, :, [0, 2, 3, 5, 6]] -= population(count, seed=seed)[:, :, [0, 2, 3, 5, 6]] // 20
        control[seed], upgraded[seed] = scores(first[:, 0]), scores(first[:, 1])
    return control, upgraded


# Two-sided 95 % and 99 %, as printed in every table of Student's t.
TABLE = {
    1: (12.7062, 63.6567),
    2: (4.3027, 9.9248),
    3: (3.1824, 5.8409),
    4: (2.7764, 4.6041),
    5: (2.5706, 4.0321),
    9: (2.2622, 3.2498),
    10: (2.2281, 3.1693),
    30: (2.0423, 2.7500),
    120: (1.9799, 2.6174),
}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_table(freedom):
    found = t_quantile(0.975, freedom), t_quantile(0.995, freedom)
    assert found == pytest.approx(TABLE[freedom], abs=5.1e-5)
    assert t_quantile(0.5, freedom) == pytest.approx(0, abs=1e-12)


def test_quantiles_are_not_the_normal_ones():
    assert abs(t_quantile(0.975, 2) - statistics.NormalDist().inv_cdf(0.975)) > 2


def test_one_value_has_no_interval():
    assert t_interval([]) is None
    assert t_interval([1.0]) is None
    assert t_interval([0.25, 0.25]) == (0.25, 0.25)


def coverage_over_seeds(factor: float) -> float:
    """How often the interval of three draws, scaled, holds the mean they were drawn from."""
    draws = torch.randn(4000, 3, generator=torch.Generator().manual_seed(5)).double() + 0.3
    held = 0
    for values in draws.tolist():
        low, high = t_interval(values)
        middle, reach = (low + high) / 2, (high - low) / 2 * factor
        held += middle - reach <= 0.3 <= middle + reach
    return held / len(draws)


def test_intervals_over_seeds_hold_the_mean_as_often_as_they_say():
    assert coverage_over_seeds(1) == pytest.approx(0.95, abs=0.012)


def test_intervals_of_the_normal_distribution_would_not():
    assert coverage_over_seeds(1.96 / 4.3027) < 0.85


def naive_bootstrap(tallies: Tensor, resamples: int, seed: int) -> Tensor:
    """Differences of mIoU, draw by draw, picture by picture. [R]"""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(tallies), (resamples, len(tallies)), generator=generator)
    found = []
    for picture in drawn:
        per_seed = []
        for s in range(tallies.shape[2]):
            sums = [sum(tallies[i, arm, s] for i in picture.tolist()) for arm in range(2)]
            before, after = (scores_of(one)["miou"].item() for one in sums)
            per_seed.append(after - before)
        found.append(statistics.fmean(per_seed))
    return torch.tensor(found, dtype=torch.float64)


def stacked(control: dict[int, Scores], upgraded: dict[int, Scores]) -> Tensor:
    both = [[arm[s].tallies for s in sorted(arm)] for arm in (control, upgraded)]
    return torch.stack([torch.stack(one, 1) for one in both], 1)


def test_the_bootstrap_is_the_loop():
    given = arms(seeds=2, count=12, gain=0.01)
    found = compare(*given, resamples=300, seed=4).measures["miou"].over_pictures
    drawn = naive_bootstrap(stacked(*given), 300, 4)
    truth = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert_close64(torch.tensor(found, dtype=torch.float64), truth, relative=1e-9)
    with pytest.raises(AssertionError, match=DIFFERS):
        other = compare(*given, resamples=300, seed=5).measures["miou"].over_pictures
        assert_close64(torch.tensor(other, dtype=torch.float64), truth, relative=1e-3)


def test_parts_of_the_resamples_change_nothing():
    """More than one part is drawn at once; each picture is drawn N times in N draws on average."""
    ones = torch.ones(7, 1)
    found = resampled(ones, lambda sums: sums, resamples=613, seed=0)
    assert_close64(found, torch.full((613, 1), 7.0, dtype=torch.float64))
    indices = torch.eye(5)
    found = resampled(indices, lambda sums: sums, resamples=4000, seed=0)
    assert_close64(found.mean(0), torch.ones(5).double(), relative=0.05)
    assert found.std(0).min() > 0.5  # drawn with replacement


def coverage_over_pictures(factor: float) -> float:
    """How often the bootstrap's interval, scaled, holds the difference over all pictures."""
    world = population(4000, gain=0.01, seed=8)
    sums = scores_of(world.sum(0))["miou"]
    truth = (sums[1] - sums[0]).item()
    generator, held, trials = torch.Generator().manual_seed(2), 0, 400
    for _ in range(trials):
        drawn = world[torch.randint(len(world), (60,), generator=generator)]
        pair = [{0: scores(drawn[:, arm])} for arm in range(2)]
        low, high = compare(pair[0], pair[1], resamples=300).measures["miou"].over_pictures
        middle, reach = (low + high) / 2, (high - low) / 2 * factor
        held += middle - reach <= truth <= middle + reach
    return held / trials


def test_intervals_over_pictures_hold_the_difference_as_often_as_they_say():
    assert coverage_over_pictures(1) == pytest.approx(0.945, abs=0.025)


def test_narrower_intervals_over_pictures_would_not():
    assert coverage_over_pictures(0.6) < 0.85


def test_pictures_stay_in_pairs():
    """Hard pictures are hard for both: drawn apart, the differences spread several times as far."""
    control, upgraded = arms(seeds=1, gain=0.01, noise=0.01)
    low, high = compare(control, upgraded).measures["miou"].over_pictures
    apart = [
        resampled(
            arm[1].tallies, lambda sums: scores_of(sums)["miou"][:, None], resamples=2000, seed=s
        )
        for s, arm in enumerate((control, upgraded))
    ]
    (unpaired,) = percentile_interval(apart[1] - apart[0])
    assert (unpaired.high - unpaired.low) > 3 * (high - low)


def test_differences_are_those_of_the_scores():
    control, upgraded = arms(gain=0.02)
    found = compare(control, upgraded)
    for name, word in MEASURES.items():
        measure = found.measures[name]
        pairs = [(getattr(control[s], name), getattr(upgraded[s], name)) for s in (1, 2, 3)]
        assert measure.name == word
        assert measure.per_seed == pytest.approx([after - before for before, after in pairs])
        assert measure.control == pytest.approx(statistics.fmean(pair[0] for pair in pairs))
        assert measure.upgraded == pytest.approx(statistics.fmean(pair[1] for pair in pairs))
        assert measure.over_seeds == pytest.approx(t_interval(measure.per_seed))
    assert [one.name for one in found.classes] == list(CLASSES)
    for c in range(3):
        shown = found.classes[c].per_seed[0], found.outlines[c].per_seed[0]
        first = upgraded[1].class_iou[c] - control[1].class_iou[c]
        second = upgraded[1].class_boundary_iou[c] - control[1].class_boundary_iou[c]
        assert shown == pytest.approx((first, second))


def test_seeds_are_paired_by_name_not_by_order():
    control, upgraded = arms(gain=0.02)
    for turned in (control, upgraded):
        pair = [
            dict(reversed(arm.items())) if arm is turned else arm for arm in (control, upgraded)
        ]
        assert compare(*pair).as_dict() == compare(control, upgraded).as_dict()


def test_a_class_that_never_occurs_is_left_out():
    control, upgraded = arms()
    for arm in (control, upgraded):
        for one in arm.values():
            one.tallies[..., 2] = 0
    found = compare(control, upgraded)
    absent = found.classes[2]
    assert math.isnan(absent.mean)
    assert (absent.over_seeds, absent.over_pictures, absent.verdict) == (
        None,
        None,
        "no gain is shown",
    )
    assert absent.cells() == ["pole", "–", "–", "–", "–", "–", "no gain is shown"]
    assert found.as_dict()["classes"][2]["difference"] is None
    assert not math.isnan(found.measures["miou"].mean)


def test_a_class_in_one_picture_only_has_an_interval_of_the_draws_that_hold_it():
    control, upgraded = arms(seeds=1, gain=0.05)
    for arm in (control, upgraded):
        arm[1].tallies[1:, :, 2] = 0
    one = compare(control, upgraded).classes[2]
    assert one.over_pictures == pytest.approx((one.mean, one.mean))


def test_one_network_against_itself_gains_exactly_nothing():
    control, _ = arms()
    found = compare(control, control)
    for one in (*found.measures.values(), *found.classes, *found.outlines):
        assert (one.mean, one.over_seeds, one.over_pictures) == (0, (0, 0), (0, 0))
        assert one.verdict == "no gain is shown"


def test_a_real_gain_is_found_and_a_loss_too():
    control, upgraded = arms(gain=0.05)
    assert compare(control, upgraded).verdict == "gain"
    assert compare(upgraded, control).verdict == "loss"


def test_noise_is_seldom_called_a_gain():
    """Two networks that are equally good: both intervals must lie above 0 by chance."""
    called = 0
    for trial in range(200):
        control, upgraded = {}, {}
        for seed in range(3):
            pair = population(30, seed=1000 * trial + seed)
            first = population(30, seed=1000 * trial)
            pair[:, :, [1, 4, 7]] = first[:, :, [1, 4, 7]]
            control[seed], upgraded[seed] = scores(pair[:, 0]), scores(pair[:, 1])
        called += compare(control, upgraded, resamples=200).verdict == "gain"
    assert called / 200 < 0.05


@pytest.mark.parametrize(
    ("seeds", "pictures", "verdict"),
    [
        (ABOVE_0, ABOVE_0, "gain"),
        (None, ABOVE_0, "gain"),
        (ABOVE_0, AROUND_0, "no gain is shown"),
        (AROUND_0, ABOVE_0, "no gain is shown"),
        (ABOVE_0, BELOW_0, "no gain is shown"),
        (None, AROUND_0, "no gain is shown"),
        (AROUND_0, BELOW_0, "no gain is shown"),
        (BELOW_0, BELOW_0, "loss"),
        (None, BELOW_0, "loss"),
        (None, None, "no gain is shown"),
        (Interval(0.0, 0.1), ABOVE_0, "no gain is shown"),
    ],
)
def test_verdicts(seeds, pictures, verdict):
    assert Difference("mIoU", 0.4, 0.41, (0.01,), seeds, pictures).verdict == verdict


def made(seeds: tuple[int, ...], over_seeds: Interval | None, over: Interval) -> Comparison:
    def difference(name: str) -> Difference:
        return Difference(name, 0.4164, 0.4255, (0.0091,) * len(seeds), over_seeds, over)

    measures = {name: difference(word) for name, word in MEASURES.items()}
    classes = (difference("a|b"),)
    names = ("control", "upgraded")
    return Comparison(*names, seeds, 101, 2000, 0.95, measures, classes, classes)


SENTENCES = {
    "gain": (
        made((1, 2, 3), Interval(0.003, 0.0152), Interval(0.0041, 0.0132)),
        "A gain: mIoU of upgraded is +0.91 points against control (95 % interval +0.30 … +1.52 "
        "over 3 seeds, +0.41 … +1.32 over 101 pictures).",
    ),
    "no gain": (
        made((1, 2), Interval(-0.0021, 0.02), Interval(0.0041, 0.0132)),
        "No gain is shown: mIoU of upgraded is +0.91 points against control (95 % interval "
        "−0.21 … +2.00 over 2 seeds, +0.41 … +1.32 over 101 pictures).",
    ),
    "one seed": (
        made((1,), None, Interval(-0.02, -0.01)),
        "A loss with this seed: mIoU of upgraded is +0.91 points against control (95 % interval "
        "−2.00 … −1.00 over 101 pictures; one seed cannot say how another would end).",
    ),
}


@pytest.mark.parametrize(("comparison", "sentence"), SENTENCES.values(), ids=SENTENCES)
def test_the_verdict_in_words(comparison, sentence):
    assert comparison.sentence == sentence
    assert str(comparison).splitlines()[0] == sentence


def test_tables():
    found = SENTENCES["gain"][0]
    head = ["measure", "control", "upgraded", "difference", "over 3 seeds", "over 101 pictures"]
    row = ["mIoU", "41.64", "42.55", "+0.91", "+0.30 … +1.52", "+0.41 … +1.32"]
    lines = [re.split(r" {2,}", line.strip()) for line in str(found).splitlines()]
    assert lines[2] == [*head, "verdict"]
    assert lines[4] == [*row, "gain"]
    page = found.as_markdown().splitlines()
    assert page[:3] == [
        f"| {' | '.join(head)} | verdict |",
        "|:---|---:|---:|---:|---:|---:|---:|",
        f"| {' | '.join(row)} | gain |",
    ]
    ours = [line for line in page if "a\\|b" in line]
    assert ours == [f"| a\\|b | {' | '.join(row[1:])} | gain |"] * 2


def test_points_and_spans():
    assert (points(-0.00001), points(1.0), span(None)) == ("−0.00", "100.00", "–")


def unlike(change: str) -> tuple[dict[int, Scores], dict[int, Scores]]:
    control, upgraded = arms(seeds=2)
    last = upgraded[2]
    if change == "seeds":
        del upgraded[2]
    if change == "nothing":
        return {}, {}
    if change == "classes":
        upgraded[2] = scores(last.tallies, ("sky", "road", "tree"))
    if change == "pictures":
        upgraded[2] = scores(last.tallies[:-1])
    if change == "labels":
        last.tallies[3, 1, 0] += 1
    return control, upgraded


UNLIKE = {
    "seeds": "control has seeds 1, 2, upgraded has 1: expected the same seeds, at least one. Train "
    "both arms with each.",
    "nothing": "control has seeds none, upgraded has none: expected the same seeds, at least one. "
    "Train both arms with each.",
    "classes": "upgraded, seed 2: measured with other classes than control, seed 1. Measure all on "
    "the same data.",
    "pictures": "upgraded, seed 2: measured with other pictures than control, seed 1. Measure all "
    "on the same data.",
    "labels": "upgraded, seed 2: measured with other labels or another band than control, seed 1. "
    "Measure all on the same data.",
}


@pytest.mark.parametrize(("change", "message"), UNLIKE.items())
def test_what_cannot_be_compared_is_refused(change, message):
    with pytest.raises(DataError) as raised:
        compare(*unlike(change))
    assert str(raised.value) == message
