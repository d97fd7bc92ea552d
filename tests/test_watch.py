"""The watch warns of runs that go nowhere, once, and is silent about those that go well."""

import json
import math
import re

import numpy as np
import pytest

from fastgan.commands import TrainCommand
from fastgan.config import flag_of
from fastgan.losses import Objective
from fastgan.watch import ALIKE_STEPS, OLDER, TICK_STEPS, TICKS, Watch, diversity

# Ticks of real runs: (kimg, D(x), D(G(z))).
WELL = [  # the recipe quickstart
    *((0.512, 0.7596, 0.7843), (4.512, 0.5945, 0.4049), (8.512, 0.5948, 0.3691)),
    *((12.512, 0.6741, 0.3253), (16.512, 0.6874, 0.3495), (20.512, 0.6874, 0.3303)),
    *((24.512, 0.7617, 0.2584), (28.512, 0.6653, 0.3408), (40.544, 0.7186, 0.2761)),
]
D_AHEAD = [  # --beta1 0.9: G learned all the time, and had D at 0.95 and 0.05 in the end
    *((0.608, 0.8494, 0.3138), (5.408, 0.9762, 0.0231), (10.208, 0.9865, 0.0133)),
    *((15.008, 0.9863, 0.0115), (19.808, 0.9817, 0.0133), (22.016, 0.9904, 0.0088)),
    *((24.608, 0.9790, 0.0168), (34.208, 0.9754, 0.0274), (58.208, 0.9406, 0.0578)),
]
D_WON = [  # --lr-g 1e-6
    *((0.208, 0.8673, 0.1651), (0.400, 0.9790, 0.0233), (0.608, 0.9921, 0.0105)),
    *((0.800, 0.9944, 0.0052), (1.008, 0.9951, 0.0046), (1.200, 0.9970, 0.0032)),
    *((1.408, 0.9975, 0.0027), (1.600, 0.9983, 0.0021), (1.808, 0.9986, 0.0018)),
    *((2.000, 0.9985, 0.0017), (11.00, 0.9995, 0.0007), (20.00, 0.9998, 0.0004)),
]
G_WON = [  # --lr-d 1e-6
    *((1.02, 0.6576, 0.9801), (2.05, 0.6727, 0.9918), (3.01, 0.6798, 0.9947)),
    *((4.03, 0.6752, 0.9960), (8.00, 0.6871, 0.9981), (12.0, 0.6914, 0.9987)),
    *((16.0, 0.7034, 0.9988), (20.0, 0.7052, 0.9989)),
]
# The diversity of grids a kimg apart of one run: with --lr-g 0.02 from 20 kimg on, where nearly all
# were one face until 23 kimg.
RISING = [0.01, 0.07, 0.15, 0.17, 0.21, 0.29, 0.40, 0.45, 0.45, 0.55, 0.62, 0.65, 0.67, 0.70, 0.72]
RISING += [0.74, 0.76, 0.78, 0.78, 0.80, 0.81]
FELL = [0.14, 0.14, 0.25, 0.34, 0.40, 0.43, 0.50, 0.53, 0.55, 0.57, 0.58, 0.61, 0.64, 0.66]


def row(kimg, real=0.7, fake=0.3, batch=32, **more):
    return {"step": round(kimg * 1000 / batch), "kimg": kimg, "d_real": real, "d_fake": fake} | more


def told(watch, ticks, batch=32):
    """What the watch says of (kimg, D(x), D(G(z))): {kimg: warning}."""
    said = {kimg: watch.tick(row(kimg, real, fake, batch)) for kimg, real, fake in ticks}
    return {kimg: warning for kimg, warning in said.items() if warning}


def pictures(count=64, size=32, seed=0):
    """uint8 [count, size, size, 3], unlike each other in every quarter."""
    coarse = np.random.default_rng(seed).integers(40, 216, (count, 4, 4, 3), np.uint8)
    return coarse.repeat(size // 4, 1).repeat(size // 4, 2)


REAL = pictures()


def alike(part, real=REAL):
    """Pictures of this diversity, real's being 1."""
    return (128 + part * (real.astype(np.float64) - 128)).round().astype(np.uint8)


def told_of_grids(watch, values, start=0.0):
    """What the watch says of grids a kimg apart of these diversities: {kimg: warning}."""
    said = {start + i: watch.samples(alike(v), start + i)[1] for i, v in enumerate(values)}
    return {kimg: warning for kimg, warning in said.items() if warning}


SURE_OF_REAL = [(i, 0.9999, 0.2) for i in range(1, 60)]  # and not of G's
SURE_OF_FAKE = [(i, 0.9, 0.0001) for i in range(1, 60)]


@pytest.mark.parametrize("ticks", [WELL, D_AHEAD, SURE_OF_REAL, SURE_OF_FAKE])
def test_a_run_that_goes_well_has_no_warning(ticks):
    watch = Watch(REAL)
    assert not told(watch, ticks)
    assert not told(watch, [(kimg + 100, *rest) for kimg, *rest in ticks])


def test_d_that_has_won_is_told_once_with_since_when():
    (kimg, warning), *more = told(Watch(REAL), D_WON, batch=16).items()
    assert kimg == 11.0 and not more  # TICKS are over at 1.8 kimg, TICK_STEPS are not
    assert "since 0.8 kimg" in warning and "D(x) 0.9995, D(G(z)) 0.0007" in warning
    assert "lower --lr-d or raise --lr-g" in warning


def test_g_that_has_won_is_told_once_with_since_when():
    (kimg, warning), *more = told(Watch(REAL), G_WON, batch=16).items()
    assert kimg == 12.0 and not more
    assert "since 1.02 kimg" in warning and "lower --lr-g or raise --lr-d" in warning


def test_of_minimax_g_has_nothing_to_learn_from_where_d_tells_its_images():
    tells, fooled = [[(i, 0.9, fake) for i in range(1, 60)] for fake in (0.001, 0.999)]
    (warning,) = told(Watch(REAL, objective=Objective("minimax")), tells).values()
    assert "gives G nothing to learn from: lower --lr-d, or take --loss non-s" in warning
    assert not told(Watch(REAL, objective=Objective("minimax")), fooled)  # it learns the most
    assert not told(Watch(REAL), tells) and told(Watch(REAL), fooled)


def test_a_smoothed_d_has_won_where_it_meets_its_target():
    ticks = [(i, 0.9, 0.001) for i in range(1, 60)]
    (warning,) = told(Watch(REAL, objective=Objective(label_smoothing=0.1)), ticks).values()
    assert "lower --lr-d or raise --lr-g" in warning
    assert not told(Watch(REAL), ticks)


def test_of_hinge_it_is_ds_loss_that_says_so():
    """Beyond both margins the means of sigmoids are 0.73 and 0.27, or more and less."""

    def said(loss):
        watch = Watch(REAL, objective=Objective("hinge"))
        rows = [row(i, 0.8, 0.2, d_loss=loss) for i in range(1, 60)]
        return [warning for one in rows if (warning := watch.tick(one))]

    (warning,) = said(0.001)
    assert "lower --lr-d or raise --lr-g" in warning and not said(0.3)


def test_a_d_that_is_sure_for_less_than_so_many_ticks_or_steps_is_not_told():
    sure, unsure = (0.999, 0.001), (0.9, 0.1)
    often = [(i, *sure) for i in range(1, TICKS)]
    assert not told(Watch(REAL), [*often, (TICKS, *unsure)], batch=1)
    assert told(Watch(REAL), [*often, (TICKS, *sure)], batch=1)
    # as D was on CelebA by the tutorial, at steps 60 to 190
    short = [(i, *sure) for i in range(1, 4 * TICKS)]
    assert not told(Watch(REAL), short, batch=1000 * 4 * TICKS / TICK_STEPS)
    assert told(Watch(REAL), [*short, (4 * TICKS, *sure)], batch=1000 * 4 * TICKS / TICK_STEPS)


@pytest.mark.parametrize("sure", [(0.999, 0.001), (0.6, 0.999)])
def test_a_warning_comes_again_only_after_its_cause_had_gone(sure):
    def ticks(start, *pair):
        return [(start + i, *pair) for i in range(20)]

    watch = Watch(REAL)
    assert len(told(watch, ticks(1, *sure))) == 1
    nearly = (0.99, 0.01) if sure[1] < 0.5 else (0.6, 0.98)
    assert not told(watch, ticks(21, *nearly)) and not told(watch, ticks(41, *sure))
    assert not told(watch, ticks(61, 0.7, 0.3))
    (again,) = told(watch, ticks(81, *sure)).values()
    assert "since 80 kimg" in again


def test_numbers_that_are_none_give_no_warning():
    ticks = [(i, math.nan, math.nan) for i in range(1, 60)]
    assert not told(Watch(REAL), ticks)


def test_a_fall_is_told_at_the_second_grid_with_what_was_before():
    watch = Watch(REAL)
    watch.tick(row(20.0))
    assert not told_of_grids(watch, RISING)
    (kimg, warning), *more = told_of_grids(watch, FELL, start=21.0).items()
    assert kimg == 22.0 and not more
    assert "since 21 kimg" in warning
    assert "0.14 as diverse as real images, and were 0.81 at 20 kimg" in warning


def test_one_grid_that_falls_is_no_warning():
    assert not told_of_grids(Watch(REAL), [0.8, 0.1, 0.8, 0.1, 0.8])


def test_a_fall_is_told_again_only_after_the_samples_had_recovered():
    watch = Watch(REAL)
    assert len(told_of_grids(watch, [0.8, 0.1, 0.1, 0.1])) == 1
    assert not told_of_grids(watch, [0.45, 0.1, 0.1], start=4.0)  # past half, and not clear of it
    assert list(told_of_grids(watch, [0.7, 0.1, 0.1, 0.1], start=7.0)) == [9.0]


def test_a_new_generators_grey_is_no_fall_and_neither_is_the_end_of_noise():
    assert not told_of_grids(Watch(REAL), [0.15, 0.01, 0.01, 0.02, 0.01])
    watch = Watch(alike(0.4))  # of noise twice as diverse as real images are
    said = [watch.samples(alike(v), i) for i, v in enumerate([1.0, 0.24, 0.24, 0.24])]
    assert [round(v, 1) for v, _ in said] == [2.5, 0.6, 0.6, 0.6]
    assert not any(warning for _, warning in said)


@pytest.mark.parametrize(
    ("real", "fake", "advice"),
    [
        (0.98, 0.02, "D is far ahead"),
        (0.42, 0.56, "G is ahead of D"),
        (0.70, 0.30, "lower --lr-g and --lr-d"),
    ],
)
def test_samples_that_stay_alike_are_told_with_what_the_losses_say(real, fake, advice):
    watch = Watch(REAL)
    early, late = ALIKE_STEPS / 1000 - 0.1, ALIKE_STEPS / 1000
    watch.tick(row(early, real, fake, batch=1))
    assert not told_of_grids(watch, [0.1] * 5)
    watch.tick(row(late, real, fake, batch=1))
    (warning,) = told_of_grids(watch, [0.1] * 5, start=5.0).values()
    assert f"after {ALIKE_STEPS:,} steps" in warning and advice in warning
    assert not told_of_grids(watch, RISING[7:], start=10.0)


def test_diversity_is_one_for_real_images_and_falls_to_nothing():
    watch = Watch(REAL)
    assert watch.samples(REAL, 0.0)[0] == 1.0
    assert watch.samples(alike(0.5), 0.0)[0] == pytest.approx(0.5, abs=0.01)
    assert watch.samples(REAL[:1].repeat(64, 0), 0.0)[0] == 0.0
    other = watch.samples(pictures(seed=1), 0.0)[0]
    assert other == pytest.approx(1.0, abs=0.05)


def test_few_images_over_and_over_are_alike_though_their_deviation_is_that_of_many():
    few = REAL[np.arange(64) % 8]
    assert few.std(0).mean() > 0.9 * REAL.std(0).mean()
    assert diversity(few) == 0.0
    assert diversity(np.concatenate([REAL[:32], REAL[:1].repeat(32, 0)])) < 0.6 * diversity(REAL)


def test_a_checkerboard_is_no_diversity():
    one = np.full((64, 64, 64, 3), 128, np.uint8)
    board = np.indices((64, 64)).sum(0) % 2
    strength = np.random.default_rng(0).integers(0, 100, (64, 1, 1, 1))
    noisy = (one + board[None, :, :, None] * strength - strength // 2).astype(np.uint8)
    flat = (one + strength - strength // 2).astype(np.uint8)
    assert noisy.std(0).mean() > 10 and diversity(noisy) < 0.6 * diversity(flat)


@pytest.mark.parametrize("size", [32, 40, 56, 96, 112, 256])
def test_diversity_is_in_grey_levels_at_every_size(size):
    levels = np.uint8([0, 10, 20, 40]).reshape(4, 1, 1, 1)
    images = np.broadcast_to(levels, (4, size, size, 3))
    assert diversity(images) == pytest.approx((10 + 10 + 10 + 20) / 4)


@pytest.mark.parametrize("where", [(slice(16), slice(None)), (slice(16, 32), slice(40, 48))])
def test_diversity_sees_every_part_of_the_last_image_and_colour(where):
    images = np.zeros((5, 32, 48, 3), np.uint8)
    images[4, *where, 2] = 30
    share = images[4].astype(bool).mean()
    assert diversity(images) == pytest.approx(30 * share**0.5 / 5)


def test_as_many_real_images_are_compared_as_samples():
    watch = Watch(REAL)
    for count in (2, 5, 64):
        spread = np.linspace(0, 63, count).astype(int)
        assert watch.samples(REAL[spread], 0.0)[0] == 1.0
    few = Watch(REAL[:8])  # of a set with no more
    assert few.samples(REAL, 0.0)[0] == pytest.approx(1.0, rel=0.2)


def test_a_large_grid_is_compared_in_part_and_that_is_spread_over_it(monkeypatch):
    monkeypatch.setattr("fastgan.watch.MOST", 4)
    value, _ = Watch(REAL).samples(alike(0.5), 0.0)
    part = [0, 21, 42, 63]
    assert value == diversity(alike(0.5)[part]) / diversity(REAL[part])


@pytest.mark.parametrize(
    ("real", "fake"), [(REAL[:1], REAL), (REAL, REAL[:1]), (REAL[:1].repeat(9, 0), REAL[:9])]
)
def test_one_image_and_equal_real_images_give_no_statement(real, fake):
    watch = Watch(real, [row(1000.0)])
    for i in range(5):
        value, warning = watch.samples(fake, float(i))
        assert math.isnan(value) and warning is None


@pytest.mark.parametrize(("count", "says"), [(3, 0), (4, 1)])
def test_of_fewer_than_four_images_nothing_is_said(count, says):
    real = REAL[:count]
    watch = Watch(real, [row(1000.0)])
    said = [watch.samples(alike(part, real), 0.0)[1] for part in (0.9, 0.1, 0.1, 0.1)]
    assert sum(bool(warning) for warning in said) == says


def test_tensors_are_images_too():
    torch = pytest.importorskip("torch")
    watch = Watch(torch.from_numpy(REAL))
    assert watch.samples(torch.from_numpy(REAL), 0.0)[0] == 1.0


@pytest.mark.parametrize("wrong", [REAL[0], REAL[..., :1], REAL.astype(np.float32)])
def test_other_arrays_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be uint8 \[N, H, W, 3\], got "):
        Watch(REAL).samples(wrong, 0.0)
    with pytest.raises(ValueError, match=r"must be uint8 \[N, H, W, 3\], got "):
        Watch(wrong)


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"must be \[32, 32, 3\] .*, got \[64, 64, 3\]"):
        Watch(REAL).samples(pictures(size=64), 0.0)


@pytest.mark.parametrize(("ticks", "at"), [(D_WON, 11.0), (G_WON, 12.0)])
def test_a_resumed_run_repeats_no_warning_and_counts_on(ticks, at):
    rows = [json.loads(json.dumps(row(*tick, batch=16))) for tick in ticks]
    for cut in range(len(rows) + 1):
        watch = Watch(REAL, rows[:cut])
        said = [r["kimg"] for r in rows[cut:] if watch.tick(r)]
        assert said == ([at] if cut == 0 or rows[cut - 1]["kimg"] < at else [])


def test_a_resumed_run_knows_its_best_diversity_where_its_rows_have_it():
    rows = [row(i + 0.5, diversity=v) for i, v in enumerate(RISING)] + [row(21.0, diversity=None)]
    assert list(told_of_grids(Watch(REAL, rows), FELL, start=21.0)) == [22.0]
    assert not told_of_grids(Watch(REAL, [row(21.0)]), FELL, start=21.0)
    rows += [row(22.0, diversity=FELL[0]), row(23.0, diversity=FELL[1])]
    assert not told_of_grids(Watch(REAL, rows), FELL[2:], start=23.0)


def test_every_flag_that_a_warning_names_exists():
    flags = {flag_of(key) for key in TrainCommand.model_fields}
    watch = Watch(REAL)
    said = [*told(watch, D_WON, 16).values(), *told(Watch(REAL), G_WON, 16).values()]
    for real, fake in [(0.98, 0.02), (0.42, 0.56), (0.7, 0.3)]:
        said += told_of_grids(Watch(REAL, [row(1000.0, real, fake)]), [0.1, 0.1]).values()
    said += told_of_grids(Watch(REAL), [0.8, 0.1, 0.1]).values()
    assert len(said) == 6
    for warning in said:
        named = set(re.findall(r"--[a-z0-9-]+", warning))
        assert {"--resume", "--beta1"} < named <= flags
        assert "\n" not in warning and warning.endswith(OLDER)
