"""The DALI graph of the GPU, run on the CPU's operators against Pillow; and on a GPU where there is one."""

import dataclasses
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import encode_video, make_loader, make_sampling, picture, write_folders
from test_loader import levels, reference_pairs

from fasttrain.data import FrameIndex, open_source
from fasttrain.data import loader as loader_module
from fasttrain.data.dali import (
    GraphStage,
    InUse,
    Upright,
    new_pipeline,
    open_stage,
    pair_graph,
    rgb_correction,
)
from fasttrain.data.index import VideoIndex
from fasttrain.data.sampling import Draws
from fasttrain.data.video import has_nvdec, nvdec_decodes, probe_video
from fasttrain.errors import InputError

SIZE = 40
needs_nvdec = pytest.mark.skipif(not has_nvdec(), reason="needs NVDEC (libnvcuvid.so.1)")
PAIRS = 3


def make_stage(index: FrameIndex, videos: Upright | None = None, prefetch: int = 1) -> GraphStage:
    return GraphStage(
        storage=index.storage,
        videos=videos,
        device=torch.device("cpu"),
        decoder="cpu",
        jpeg_engine_load=0.65,
        batch_size=PAIRS,
        image_size=SIZE,
        num_threads=2,
        prefetch=prefetch,
        dtype=torch.float32,
    )


def upright(index: VideoIndex, turns: int = 0, matrix: str = "bt601") -> Upright:
    return Upright(np.full(len(index), turns), [matrix] * len(index), torch.device("cpu"))


def drawn(index: FrameIndex, number: int, **changes) -> tuple[list, Draws]:
    draws = make_sampling(pairs_per_video=8, **changes).draw(
        index.num_frames, np.zeros(PAIRS, dtype=int), np.arange(PAIRS) * 7 + number
    )
    return [index.read(int(v), f) for v, f in zip(draws.videos, draws.frames, strict=True)], draws


def check_against_pillow(index: FrameIndex, stage: GraphStage, frames: FrameIndex) -> None:
    sampling = make_sampling(pairs_per_video=8)
    for number in range(2):
        pairs, draws = drawn(index, number)
        stage.submit(pairs, draws)
        got = stage.collect()
        assert got.shape == (2, PAIRS, 3, SIZE, SIZE)
        expected = reference_pairs(frames, sampling, np.zeros(PAIRS, dtype=int), draws.samples, SIZE)
        assert np.abs(levels(got) - expected).mean() < 2


def test_the_graph_on_images(tmp_path: Path) -> None:
    index = open_source(write_folders(tmp_path, [20, 9, 30]))
    check_against_pillow(index, make_stage(index), index)


def test_the_graph_on_real_images(shared: Path) -> None:
    index = open_source(shared / "davis" / "JPEGImages" / "480p")
    check_against_pillow(index, make_stage(index), index)


def test_the_graph_on_raw_frames(shared: Path) -> None:
    index = open_source(shared / "videos")
    check_against_pillow(index, make_stage(index), index)


def vp9_videos(folder: Path) -> VideoIndex:
    """VP9 is what DALI decodes on a CPU too."""
    for video in range(3):
        encode_video(
            folder / f"{video}.webm",
            [picture(video, t, 130, 160) for t in range(24)],
            "libvpx-vp9",
            g=6,
            b=4_000_000,
        )
    return open_source(folder)


def test_the_graph_on_clips(tmp_path: Path) -> None:
    index = vp9_videos(tmp_path)
    clips = index.as_clips()
    assert clips.fingerprint() == index.fingerprint()
    np.testing.assert_array_equal(clips.read_frame(1, 5), index.read_frame(1, 5))
    check_against_pillow(clips, make_stage(clips, upright(index)), index)


class Turned(VideoIndex):
    """The same videos as if their display matrix turned them."""

    def __init__(self, index: VideoIndex, turns: int) -> None:
        super().__init__(dict(zip(index.names, index.videos, strict=True)), [])
        self.turns = turns

    def read_frame(self, video: int, frame: int) -> np.ndarray:
        return np.ascontiguousarray(np.rot90(super().read_frame(video, frame), self.turns))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_clips_are_turned_upright(tmp_path: Path, turns: int) -> None:
    index = vp9_videos(tmp_path)
    stage = make_stage(index.as_clips(), upright(index, turns))
    check_against_pillow(index.as_clips(), stage, Turned(index, turns))


def test_each_clip_of_a_batch_gets_its_own_matrix() -> None:
    matrices = ["bt709", "bt601", "bt2020", "bt709"]
    videos = np.array([2, 1, 0, 3])
    still = np.zeros(len(videos), dtype=np.int64)
    draws = Draws(videos, videos, np.zeros((len(videos), 2), dtype=np.int64), np.zeros((4, 4)), still > 0)
    frames = torch.rand(2, len(videos), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    together = frames.clone()
    Upright(still, matrices, torch.device("cpu")).set_upright(together, draws)
    for row, video in enumerate(videos):
        alone = frames.clone()
        Upright(still, [matrices[video]] * len(videos), torch.device("cpu")).set_upright(alone, draws)
        torch.testing.assert_close(together[:, row], alone[:, row])
    assert torch.equal(together[:, 1], frames[:, 1])
    assert not any(torch.equal(together[:, row], frames[:, row]) for row in (0, 2, 3))


@pytest.mark.parametrize("matrix", ["bt709", "bt2020"])
def test_clips_get_the_matrix_of_their_stream(tmp_path: Path, matrix: str) -> None:
    """What BT.601 made of a colour becomes what its own matrix makes of it."""
    index = vp9_videos(tmp_path)
    pairs, draws = drawn(index.as_clips(), 0)
    plain, corrected = (make_stage(index.as_clips(), upright(index, 0, m)) for m in ("bt601", matrix))
    results = []
    for stage in (plain, corrected):
        stage.submit(pairs, draws)
        results.append(levels(stage.collect()))
    expected = np.einsum("ij,vbjhw->vbihw", rgb_correction(matrix), results[0]).clip(0, 255)
    np.testing.assert_allclose(results[1], expected, atol=0.01)
    # A grey has no colour to change, and pure red is where the two matrices part.
    np.testing.assert_allclose(rgb_correction(matrix).sum(axis=1), 1, atol=1e-12)
    assert np.abs(results[1] - results[0]).max() > 5


@pytest.mark.parametrize(
    ("storage", "decoder"), [("images", "cpu"), ("images", "mixed"), ("frames", "cpu"), ("clips", "mixed")]
)
def test_the_graph_for_a_gpu_ends_on_it(storage: str, decoder: str) -> None:
    """DALI checks operators and devices when a graph is defined, which takes no GPU."""
    with new_pipeline(device=torch.device("cuda", 0), batch_size=2, num_threads=1, prefetch=1):
        node = pair_graph(storage, decoder=decoder, engine_load=0.9, image_size=8, on_gpu=True, float32=False)
    assert node.device == "gpu"


def test_a_clip_that_does_not_decode_spoils_no_other_batch(tmp_path: Path) -> None:
    index = vp9_videos(tmp_path)
    stage = make_stage(index.as_clips(), upright(index), prefetch=2)
    good, draws = drawn(index.as_clips(), 0)
    bad = [[np.zeros(500, dtype=np.uint8), good[0][1]], *good[1:]]
    stage.submit(bad, draws)
    stage.submit(good, draws)
    with pytest.raises(RuntimeError):
        stage.collect()
    stage.submit(good, draws)
    first, second = stage.collect(), stage.collect()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    past_the_end = [[good[0][0], good[0][1] + 100], *good[1:]]
    stage.submit(past_the_end, draws)
    with pytest.raises(RuntimeError):
        stage.collect()


class ManualEvent:
    """An event that comes when it is told to, or waited for: then its buffer must still be there."""

    def __init__(self, buffer: weakref.ref) -> None:
        self.buffer = buffer
        self.came = False
        self.waited_for = False

    def query(self) -> bool:
        return self.came

    def synchronize(self) -> None:
        assert self.buffer() is not None
        self.came = self.waited_for = True


def test_a_buffer_is_kept_until_the_device_has_read_it() -> None:
    class Buffer:
        pass

    in_use = InUse(limit=2)
    buffers = [Buffer() for _ in range(5)]
    alive = [weakref.ref(buffer) for buffer in buffers]
    events = [ManualEvent(buffer) for buffer in alive]

    def keep(number: int) -> list[bool]:
        in_use.keep(buffers[number], until=events[number])
        buffers[number] = None
        return [buffer() is not None for buffer in alive]

    assert keep(0)[:1] == [True]
    events[0].came = True
    assert keep(1)[:2] == [False, True]
    assert keep(2)[:3] == [False, True, True]
    assert not any(event.waited_for for event in events)
    # The host is three ahead: it waits for the oldest.
    assert keep(3)[:4] == [False, False, True, True]
    assert [event.waited_for for event in events] == [False, True, False, False, False]
    keep(4)
    in_use.wait()
    assert all(event.came for event in events)
    assert not any(buffer() for buffer in alive)


def test_a_stage_leaves_the_threads_of_others_alone(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    loader = make_loader(open_source(write_folders(tmp_path, [8] * 4)), num_threads=3)
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *later] == [before, before]
    loader.close()


def test_a_gpu_decoder_needs_a_gpu() -> None:
    with pytest.raises(InputError, match=r"data\.decoder=mixed needs a GPU"):
        open_stage(
            storage="images",
            videos=None,
            device=torch.device("cpu"),
            decoder="mixed",
            jpeg_engine_load=0.65,
            batch_size=1,
            image_size=8,
            num_threads=1,
            prefetch=1,
            dtype=torch.float32,
        )


def test_videos_that_nvdec_cannot_decode_are_named(tmp_path: Path) -> None:
    encode_video(tmp_path / "small.mp4", [picture(0, t, 32, 32) for t in range(5)])
    with pytest.raises(InputError, match=r"small\.mp4 \(h264, yuv420p, 32 x 32\) is not for NVDEC"):
        open_source(tmp_path).as_clips()


def test_frames_shown_again_are_not_for_nvdec(tmp_path: Path) -> None:
    """DALI counts the frames that NVDEC decodes, and AV1 and VP9 have packets that decode none."""
    frames = [picture(0, t, 160, 208) for t in range(5)]
    av1 = probe_video(encode_video(tmp_path / "a.mp4", frames, "libsvtav1"))
    vp9 = probe_video(encode_video(tmp_path / "b.webm", frames, "libvpx-vp9"))
    assert (nvdec_decodes(av1), nvdec_decodes(vp9), vp9.miscounted) == (False, True, False)
    assert not nvdec_decodes(dataclasses.replace(vp9, miscounted=True))


@pytest.mark.parametrize("there", [True, False])
def test_videos_go_where_they_can_be_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """With a GPU and `auto`: NVDEC if all videos are for it, else the host, and a line says why."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(loader_module, "has_nvdec", lambda: there)
    index = vp9_videos(tmp_path)
    chosen, note = loader_module._for_device(index, gpu, "auto")
    assert chosen.storage == ("clips" if there else "frames")
    assert note is None if there else "the driver comes without NVDEC" in note
    assert loader_module._for_device(index, gpu, "cpu") == (index, None)
    if not there:
        with pytest.raises(InputError, match=r"data\.decoder=mixed needs NVDEC"):
            loader_module._for_device(index, gpu, "mixed")
        return
    encode_video(tmp_path / "small.mp4", [picture(0, t, 32, 32) for t in range(5)])
    chosen, note = loader_module._for_device(open_source(tmp_path), gpu, "auto")
    assert chosen.storage == "frames"
    assert "NVDEC does not take 1 of 4, the first small.mp4" in note


def on_gpu(index: FrameIndex, decoder: str, dtype: torch.dtype) -> list[torch.Tensor]:
    loader = make_loader(
        index,
        make_sampling(pairs_per_video=8),
        device=torch.device("cuda"),
        decoder=decoder,
        dtype=dtype,
        image_size=96,
        batch_size=4,
        num_steps=4,
    )
    frames = [pairs.frames for pairs in loader]
    assert all(part.device.type == "cuda" and part.dtype == dtype for part in frames)
    assert loader.faults == []
    loader.close()
    return [part.float().cpu() for part in frames]


def on_cpu(index: FrameIndex, batch_size: int = 4, steps: int = 4) -> list[torch.Tensor]:
    loader = make_loader(
        index,
        make_sampling(pairs_per_video=8),
        image_size=96,
        batch_size=batch_size,
        num_steps=steps,
    )
    frames = [pairs.frames for pairs in loader]
    loader.close()
    return frames


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["cpu", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_on_the_gpu_are_those_of_the_cpu(tmp_path: Path, decoder: str, dtype: torch.dtype) -> None:
    index = open_source(write_folders(tmp_path, [20, 9, 30]))
    for got, expected in zip(on_gpu(index, decoder, dtype), on_cpu(index), strict=True):
        assert np.abs(levels(got) - levels(expected)).mean() < 2


@pytest.mark.gpu
@needs_nvdec
@pytest.mark.parametrize(
    ("codec", "pix_fmt"),
    [("libx264", "yuv420p"), ("libx265", "yuv420p10le"), ("libvpx-vp9", "yuv420p")],
)
def test_videos_on_the_gpu_are_those_of_the_cpu(tmp_path: Path, codec: str, pix_fmt: str) -> None:
    for video in range(3):
        frames = [picture(video, t, 160, 208) for t in range(24)]
        encode_video(tmp_path / f"{video}.mp4", frames, codec, pix_fmt=pix_fmt)
    index = open_source(tmp_path)
    for got, expected in zip(on_gpu(index, "mixed", torch.float32), on_cpu(index), strict=True):
        assert np.abs(levels(got) - levels(expected)).mean() < 4


@pytest.mark.gpu
@needs_nvdec
@pytest.mark.parametrize(
    "name", ["nasa_13013.mp4", "bt709_full_range.mp4", "flipping_a_pancake.mkv", "rotated_180.mov"]
)
def test_real_videos_on_the_gpu_are_those_of_the_cpu(shared: Path, name: str) -> None:
    index = open_source(shared / "videos" / name)
    for got, expected in zip(on_gpu(index, "mixed", torch.float32), on_cpu(index), strict=True):
        assert np.abs(levels(got) - levels(expected)).mean() < 4


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["cpu", "mixed"])
def test_no_batch_is_overwritten_while_the_device_is_behind(tmp_path: Path, decoder: str) -> None:
    """The copies queue up behind long work, while DALI decodes ahead into what it thinks is free."""
    index = open_source(write_folders(tmp_path, [20, 9, 30]))
    expected = on_cpu(index, batch_size=2, steps=12)
    loader = make_loader(
        index,
        make_sampling(pairs_per_video=8),
        device=torch.device("cuda"),
        decoder=decoder,
        image_size=96,
        batch_size=2,
        num_steps=12,
    )
    busy = torch.randn(8192, 8192, device="cuda")
    got = []
    for pairs in loader:
        got.append(pairs.frames)
        for _ in range(10):
            busy = (busy @ busy).tanh()
    loader.close()
    for frames, truth in zip(got, expected, strict=True):
        assert np.abs(levels(frames.cpu()) - levels(truth)).mean() < 2


@pytest.mark.gpu
def test_a_damaged_frame_is_replaced_on_the_gpu(tmp_path: Path) -> None:
    root = write_folders(tmp_path, [8] * 6)
    for path in (root / "class_0" / "video_0").iterdir():
        path.write_bytes(b"no image")
    for decoder in ("cpu", "mixed"):
        loader = make_loader(
            open_source(root),
            device=torch.device("cuda"),
            decoder=decoder,
            num_steps=3,
            max_bad_fraction=1.0,
        )
        assert len(list(loader)) == 3
        assert {fault.name for fault in loader.faults} == {"class_0/video_0"}
        loader.close()
