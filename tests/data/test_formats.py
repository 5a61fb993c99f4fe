"""Every kind of video file and frame folder in `formats.CASES`, compared with ffmpeg's own output.

The reference is the ffmpeg command, which decodes from the start to the end, applies the display matrix and
converts to RGB with its default options. What `open_source` reads must be the same; `pack` and the training
loader are compared with what `open_source` reads.
"""

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from formats import FOLDERS, IMAGE_STEP, VIDEOS, Case, document, run_ffmpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic import make_loader, make_sampling, picture

from fasttrain.data.images import Frame, UnreadableFrameError
from fasttrain.data.index import FrameIndex, VideoIndex
from fasttrain.data.pack import PackOptions, encode_jpeg, pack
from fasttrain.data.packed import PackedIndex
from fasttrain.data.sampling import pixel_box
from fasttrain.data.sources import open_source
from fasttrain.data.video import stream_video_frames
from fasttrain.errors import InputError
from fasttrain.normalization import IMAGENET_MEAN, IMAGENET_STD

READABLE = [case for case in VIDEOS if not case.refused]
READABLE_FOLDERS = [case for case in FOLDERS if not case.refused]
CROP = 24


def by_name(cases: list[Case]) -> Callable:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all videos in `videos`, and all frame folders in `folders`."""
    root = tmp_path_factory.mktemp("formats")
    for folder in ("videos", "folders"):
        (root / folder).mkdir()
    jobs = [(case, root / "videos" / case.name) for case in VIDEOS]
    jobs += [(case, root / "folders" / case.name) for case in FOLDERS]
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda job: job[0].make(job[1]), jobs))
    return root


@pytest.fixture(scope="module")
def videos(root: Path) -> VideoIndex:
    return open_source(root / "videos", kind="videos")


@pytest.fixture(scope="module")
def folders(root: Path) -> FrameIndex:
    return open_source(root / "folders", kind="folders")


@pytest.fixture(scope="module")
def frames_of(videos: VideoIndex) -> Callable[[int], list[Frame]]:
    """Return all frames of a video by its number, read in order."""
    return lru_cache(maxsize=None)(partial(all_frames, videos))


def number_of(index: FrameIndex, case: Case) -> int:
    """Return the number of a case in an index."""
    assert case.name in index.names, dict(index.skipped).get(case.name)
    number = index.names.index(case.name)
    assert index.num_frames[number] == case.frames
    return number


def all_frames(index: FrameIndex, number: int) -> list[Frame]:
    """Read all frames of a video, in order."""
    frames = range(index.num_frames[number])
    if isinstance(index, VideoIndex):
        return list(stream_video_frames(index.videos[number], frames))
    return [index.read_frame(number, frame) for frame in frames]


def decode_with_ffmpeg(path: Path, input_options: str = "", output_options: str = "") -> bytes:
    # Without the first two options, ffmpeg repeats or drops frames to reach a constant frame rate, and scales
    # frames to the size of the first one.
    output = ("-fps_mode", "passthrough", "-noautoscale", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    try:
        return run_ffmpeg(*input_options.split(), "-i", path, *output_options.split(), *output)
    except subprocess.CalledProcessError as error:
        # ffmpeg fails if a file is damaged, but still writes all frames it can decode.
        return error.stdout


def split(data: bytes, shapes: list[tuple[int, ...]]) -> list[Frame]:
    """Split raw RGB frames of known shapes."""
    assert len(data) == sum(int(np.prod(shape)) for shape in shapes)
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    parts = np.split(np.frombuffer(data, np.uint8), ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def check_close(got: Frame, expected: np.ndarray, tolerance: float) -> None:
    assert got.shape == expected.shape
    error = np.abs(got.astype(np.int16) - expected).mean()
    assert error < tolerance if tolerance else error == 0


def test_the_documentation_lists_all_cases() -> None:
    names = [case.name for case in VIDEOS + FOLDERS]
    assert len(set(names)) == len(names)
    page = Path(__file__).parents[2] / "docs" / "formats.md"
    assert page.read_text() == document(), "run `python tests/formats.py > docs/formats.md`"


@by_name(READABLE)
def test_videos_agree_with_ffmpeg(case: Case, videos: VideoIndex, frames_of: Callable) -> None:
    number = number_of(videos, case)
    shapes = [frame.shape for frame in frames_of(number)]
    if case.damaged is not None:
        shapes.insert(case.damaged, shapes[0])
    reference = split(decode_with_ffmpeg(videos.videos[number].path, case.options), shapes)
    if case.damaged is not None:
        del reference[case.damaged]
        assert videos.videos[number].num_damaged == 1
    for frame, (got, expected) in enumerate(zip(frames_of(number), reference, strict=True)):
        check_close(got, expected, case.tolerance)
        assert np.array_equal(videos.read_frame(number, frame), got), f"frame {frame}, read alone"


@settings(max_examples=3 * len(READABLE), deadline=None)
@given(case=st.sampled_from(READABLE), data=st.data())
def test_frames_in_any_order_are_those_in_sequence(
    case: Case, data: st.DataObject, videos: VideoIndex, frames_of: Callable
) -> None:
    number = number_of(videos, case)
    numbers = data.draw(st.lists(st.integers(0, case.frames - 1), min_size=2, max_size=4))
    for frame, got in zip(numbers, videos.read(number, numbers), strict=True):
        assert np.array_equal(got, frames_of(number)[frame])


@by_name([case for case in VIDEOS if case.refused])
def test_videos_that_ffmpeg_cannot_decode_are_refused(case: Case, videos: VideoIndex, root: Path) -> None:
    assert decode_with_ffmpeg(root / "videos" / case.name) == b""
    assert case.refused in dict(videos.skipped)[case.name]


@by_name(READABLE_FOLDERS)
def test_frame_folders_agree_with_ffmpeg(case: Case, folders: FrameIndex, root: Path) -> None:
    number = number_of(folders, case)
    files = sorted((root / "folders" / case.name).iterdir())
    for frame, (got, path) in enumerate(zip(all_frames(folders, number), files, strict=True)):
        if case.reference == "picture":
            expected = picture(0, IMAGE_STEP * frame, *got.shape[:2])
        else:
            # Pillow interpolates chroma; by default, ffmpeg does not.
            conversion = "-frames:v 1 -sws_flags bilinear+accurate_rnd+full_chroma_int"
            (expected,) = split(decode_with_ffmpeg(path, "", conversion), [got.shape])
        check_close(got, expected, case.tolerance)


def check_loader(index: FrameIndex) -> None:
    """Compare one frame pair of each video in the training loader with crops cut by Pillow."""
    options = {"pairs_per_video": 1, "max_bad_fraction": 0.0}
    loader = make_loader(index, image_size=CROP, batch_size=len(index), num_steps=1, **options)
    (pairs,) = loader
    loader.close()
    assert pairs.bad_samples == []
    assert sorted(pairs.samples) == list(range(len(index)))
    epochs = np.zeros(len(index), np.int64)
    drawn = make_sampling(**options).draw(index.num_frames, epochs, pairs.samples)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    crops = ((pairs.frames * std + mean) * 255).permute(0, 1, 3, 4, 2).numpy()
    wrong = {}
    for b, row in enumerate(drawn):
        for view, frame in enumerate(row["frames"]):
            image = Image.fromarray(index.read_frame(int(row["video"]), int(frame)))
            top, left, bottom, right = pixel_box(row["box"], image.height, image.width)
            crop = image.crop((left, top, right, bottom)).resize((CROP, CROP), Image.Resampling.BICUBIC)
            expected = np.asarray(crop)[:, ::-1] if row["flip"] else np.asarray(crop)
            error = np.abs(crops[view, b] - expected).mean()
            # DALI rounds down from 16 to 8 bits.
            if error > 1:
                wrong[index.names[row["video"]]] = error
    assert wrong == {}


@pytest.fixture(params=["DALI", "PyTorch"])
def _stage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode images with DALI, or as on a machine without it."""
    if request.param == "DALI":
        pytest.importorskip("nvidia.dali")
    else:
        monkeypatch.setattr("fasttrain.data.loader.has_dali", lambda: False)


def test_the_loader_reads_all_videos(videos: VideoIndex) -> None:
    check_loader(videos)


@pytest.mark.usefixtures("_stage")
def test_the_loader_reads_all_frame_folders(root: Path, tmp_path: Path) -> None:
    for case in READABLE_FOLDERS:
        (tmp_path / case.name).symlink_to(root / "folders" / case.name)
    check_loader(open_source(tmp_path))


@pytest.mark.usefixtures("_stage")
@by_name([case for case in FOLDERS if case.refused])
def test_frame_folders_that_are_no_images_are_refused(case: Case, root: Path, tmp_path: Path) -> None:
    source = root / "folders" / case.name
    with pytest.raises(UnreadableFrameError, match=case.refused):
        open_source(source).read_frame(0, 0)
    with pytest.raises(InputError, match=case.refused):
        check_loader(open_source(source))
    with pytest.raises(InputError, match=case.refused):
        pack(source, tmp_path, PackOptions())


@pytest.mark.parametrize("kind", ["videos", "folders"])
def test_packed_sets_contain_all_frames(
    kind: str, videos: VideoIndex, folders: FrameIndex, root: Path, tmp_path: Path
) -> None:
    """Each frame is stored as `encode_jpeg` writes it, or is the original JPEG."""
    source = videos if kind == "videos" else folders
    pack(root / kind, tmp_path, PackOptions(), kind=kind)
    packed = PackedIndex(tmp_path)
    refused = {case.name for case in FOLDERS if case.refused}
    assert packed.names == [name for name in source.names if name not in refused]
    wrong = []
    for number, name in enumerate(packed.names):
        original = source.names.index(name)
        assert packed.num_frames[number] == source.num_frames[original]
        for frame, pixels in enumerate(all_frames(source, original)):
            (stored,) = packed.read(number, [frame])
            allowed = [encode_jpeg(pixels, PackOptions())]
            if kind == "folders":
                allowed.append(source.read(original, [frame])[0].tobytes())
            if stored.tobytes() not in allowed:
                wrong.append((name, frame))
    assert wrong == []
