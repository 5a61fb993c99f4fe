"""Frame pairs, crops and sample order: agreement with the paper, and reproducibility."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_sampling

from fasttrain.data.sampling import draw_crop, draw_frames, evenly_spaced, pixel_box

PAPER = {"area": (0.5, 1.0), "ratio": (3 / 4, 4 / 3)}


def uniforms(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, columns))


@given(n=st.integers(5, 2000), seed=st.integers(0, 1000))
def test_frame_2_follows_frame_1_at_the_gap(n: int, seed: int) -> None:
    gap = int(0.15 * n)
    first, second = draw_frames(np.full(64, n), uniforms(64, 2, seed), gap=0.15).T
    if gap < 1:
        assert set(first) | set(second) <= set(range(n))
        assert not np.array_equal(first, second)
    else:
        assert (second - first == gap).all()
        assert first.min() >= 1
        assert first.max() < n - gap


@given(n=st.integers(1, 300), gap=st.floats(0, 1), count=st.integers(3, 9), seed=st.integers(0, 1000))
def test_more_than_two_frames_are_in_order_and_equally_spaced(
    n: int, gap: float, count: int, seed: int
) -> None:
    frames = draw_frames(np.full(32, n), uniforms(32, count, seed), gap=gap)
    steps = np.diff(frames)
    assert frames.min() >= 0
    assert frames.max() < n
    assert steps.min() >= 0
    distance = int(gap * n)
    if n >= 5 and 1 <= distance <= n - 2 and count + 1 <= n:
        # The distance shrinks only as far as needed.
        fits = 1 + (count - 1) * distance < n
        assert set(steps.flat) == {distance if fits else (n - 2) // (count - 1)}
        assert frames.min() >= 1


# With at most four frames, the pair is independent whatever the gap.
@pytest.mark.parametrize(("n", "gap"), [(1, 0.15), (2, 0.15), (4, 0.5), (6, 0.15)])
def test_frames_of_short_videos_are_independent(n: int, gap: float) -> None:
    pairs = draw_frames(np.full(4000, n), uniforms(4000, 2), gap=gap)
    counts = np.zeros((n, n))
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    # The frequency of each of the n^2 pairs is within five standard deviations of its probability.
    probability = 1 / n**2
    tolerance = 5 * math.sqrt(probability * (1 - probability) / 4000)
    assert np.abs(counts / 4000 - probability).max() <= tolerance


@pytest.mark.parametrize("n", [7, 40])
def test_frame_1_is_uniform_on_its_range(n: int) -> None:
    gap = int(0.15 * n)
    first = draw_frames(np.full(20000, n), uniforms(20000, 2), gap=0.15)[:, 0]
    assert set(first) == set(range(1, n - gap))
    probability = 1 / (n - gap - 1)
    counts = np.bincount(first, minlength=n - gap)[1:]
    tolerance = 5 * math.sqrt(probability * (1 - probability) / 20000)
    assert np.abs(counts / 20000 - probability).max() <= tolerance


@pytest.mark.parametrize("u", [0.0, np.nextafter(1, 0)])
# With a gap of 0.9, a video of seven frames leaves no choice for frame 1.
@pytest.mark.parametrize("gap", [0.0, 0.15, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 2, 5, 7, 10**6 + 3])
@pytest.mark.parametrize("count", [2, 4])
def test_extreme_uniforms_give_frames_within_the_video(count: int, n: int, gap: float, u: float) -> None:
    frames = draw_frames([n], [[u] * count], gap=gap)
    assert frames.shape == (1, count)
    assert frames.min() >= 0
    assert frames.max() < n


def test_crops_have_the_area_and_ratio_of_the_paper() -> None:
    boxes = draw_crop(uniforms(20000, 4), **PAPER)
    top, left, bottom, right = boxes.T
    height, width = bottom - top, right - left
    assert boxes.min() >= 0
    assert boxes.max() <= 1 + 1e-12
    assert (height * width).min() >= 0.5 - 1e-12
    assert (width / height).min() >= 3 / 4 - 1e-12
    assert (width / height).max() <= 4 / 3 + 1e-12
    # The distribution is symmetric in height and width, as the ratio is log-uniform and not uniform.
    assert abs(np.log(width / height).mean()) < 5 * np.log(width / height).std() / math.sqrt(20000)
    # The offset is uniform on the range that the size of the crop permits.
    lower = height < 1
    offsets = top[lower] / (1 - height[lower])
    assert abs(offsets.mean() - 0.5) < 0.02


def test_crops_are_distributed_as_in_the_published_implementation() -> None:
    """The published implementation works in pixels; on a frame this large, rounding is negligible."""
    rng = np.random.default_rng(1)
    side = 10_000
    published = np.empty((20000, 4))
    for row in published:
        area, ratio = side**2 * rng.uniform(0.5, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width = min(round(math.sqrt(area * ratio)), side)
        height = min(round(math.sqrt(area / ratio)), side)
        row[:] = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1), height, width
    boxes = side * draw_crop(uniforms(20000, 4), **PAPER)
    ours = np.stack([boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], axis=1)
    # Some crops are clipped to the full height or width of the frame.
    assert abs((ours[:, 2] == side).mean() - (published[:, 2] == side).mean()) < 0.01
    assert (ours[:, 3] == side).mean() > 0.05
    for quantile in (0.1, 0.3, 0.5, 0.7, 0.9):
        difference = np.quantile(ours, quantile, axis=0) - np.quantile(published, quantile, axis=0)
        assert np.abs(difference).max() < 0.02 * side


def test_a_crop_wider_than_the_frame_is_clipped() -> None:
    wide = draw_crop([[0.99, 1 - 1e-12, 0.5, 0.5]], **PAPER)[0]
    area = 0.5 + 0.5 * 0.99
    height = math.sqrt(area * 3 / 4)
    np.testing.assert_allclose(wide, [0.5 * (1 - height), 0, 0.5 * (1 + height), 1], rtol=1e-9)


@given(
    box=st.tuples(st.floats(0, 0.49), st.floats(0, 0.49), st.floats(0.5, 1), st.floats(0.5, 1)),
    height=st.integers(1, 500),
    width=st.integers(1, 500),
)
def test_pixel_boxes_are_close_and_never_empty(box: tuple[float, ...], height: int, width: int) -> None:
    top, left, bottom, right = pixel_box(np.array(box), height, width)
    assert 0 <= top < bottom <= height
    assert 0 <= left < right <= width
    for pixel, edge, extent in zip((top, left, bottom, right), box, (height, width) * 2, strict=True):
        assert abs(pixel - edge * extent) <= (0.5 if extent > 2 else 1)
    # This box is smaller than a pixel.
    assert pixel_box(np.array([0.31, 0.96, 0.32, 0.97]), 10, 10) == (3, 9, 4, 10)


@settings(max_examples=50)
@given(
    samples=st.integers(1, 40),
    seed=st.integers(-(2**63), 2**63),
    start=st.integers(0, 200),
    length=st.integers(1, 100),
)
def test_the_stream_is_a_sequence_of_permutations(samples: int, seed: int, start: int, length: int) -> None:
    sampling = make_sampling(seed=seed)
    epochs, ids = sampling.order(np.arange(0, samples * 3), samples)
    for epoch in range(3):
        assert sorted(ids[epochs == epoch]) == list(range(samples))
    if samples == 40:
        assert not np.array_equal(ids[:40], ids[40:80])
    whole = sampling.order(np.arange(0, 300), samples)
    part = sampling.order(np.arange(start, start + length), samples)
    np.testing.assert_array_equal(whole[0][start : start + length], part[0])
    np.testing.assert_array_equal(whole[1][start : start + length], part[1])


def test_a_draw_depends_only_on_seed_epoch_sample_and_attempt() -> None:
    sampling = make_sampling(pairs_per_video=3)
    lengths = np.arange(20, 60)
    epochs, samples = np.array([0, 0, 5, 0]), np.array([7, 8, 7, 100])
    together = sampling.draw(lengths, epochs, samples)
    for row in range(4):
        alone = sampling.draw(lengths, epochs[row : row + 1], samples[row : row + 1])
        np.testing.assert_array_equal(together["frames"][row], alone["frames"][0])
        np.testing.assert_array_equal(together["box"][row], alone["box"][0])
        assert together["flip"][row] == alone["flip"][0]
    np.testing.assert_array_equal(together["video"], samples // 3)
    # Crops differ among the samples of a video and among the epochs of a sample.
    assert len({tuple(box) for box in together["box"]}) == 4
    other = make_sampling(seed=1, pairs_per_video=3).draw(lengths, epochs, samples)
    assert not np.array_equal(other["box"], together["box"])


def test_replacements_are_spread_over_the_data() -> None:
    sampling = make_sampling()
    lengths = np.full(50, 30)
    drawn = [sampling.draw(lengths, np.array([2]), np.array([9]), attempt) for attempt in range(1, 200)]
    videos = np.array([draw["video"][0] for draw in drawn])
    assert len(set(videos)) > 40
    again = sampling.draw(lengths, np.array([2]), np.array([9]), 17)
    np.testing.assert_array_equal(again["box"], drawn[16]["box"])


def test_evenly_spaced_numbers_include_both_ends() -> None:
    assert evenly_spaced(10, 4) == [0, 3, 6, 9]
    assert evenly_spaced(9, 4) == [0, 3, 5, 8]
    assert evenly_spaced(5, 9) == [0, 1, 2, 3, 4]
    assert evenly_spaced(0, 3) == []
    assert evenly_spaced(9, 1) == [0]
    for wanted in range(2, 30):
        frames = evenly_spaced(30, wanted)
        assert frames[0] == 0
        assert frames[-1] == 29
        assert len(set(frames)) == wanted


def test_flips_occur_with_the_given_probability() -> None:
    epochs, samples = np.zeros(4000, dtype=int), np.arange(4000)
    lengths = np.full(4000, 10)
    for flip in (0.0, 0.5, 1.0):
        flips = make_sampling(flip=flip).draw(lengths, epochs, samples)["flip"]
        assert abs(flips.mean() - flip) < 5 * 0.5 / math.sqrt(4000) * (0 < flip < 1) + 1e-9


def test_draws_do_not_change_between_releases() -> None:
    """These values are recorded. If they change, runs started with an earlier version cannot be resumed."""
    draws = make_sampling(seed=3).draw(np.full(10, 100), np.array([0, 1]), np.array([4, 4]))
    _, order = make_sampling(seed=3).order(np.arange(10), 10)
    assert draws["frames"].tolist() == [[2, 17], [14, 29]]
    assert order.tolist() == [2, 3, 6, 1, 7, 4, 8, 0, 9, 5]
    assert draws["flip"].tolist() == [False, True]
    box = [0.01638172938400011, 0.18392816571065917, 0.9919250630687847, 0.9781142755568556]
    np.testing.assert_allclose(draws["box"][0], box, rtol=1e-12)
    longer = make_sampling(seed=3, frames=4).draw(np.full(10, 100), np.array([0, 1]), np.array([4, 4]))
    assert longer["frames"].tolist() == [[2, 17, 32, 47], [9, 24, 39, 54]]
    for name in ("sample", "video", "box", "flip"):
        np.testing.assert_array_equal(longer[name], draws[name])
