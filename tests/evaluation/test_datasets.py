"""Reading the lists of published datasets, and the messages for damaged ones."""

import argparse
from pathlib import Path
from typing import Any

import pytest
from synthetic import CLASSES, LAYOUTS, TEST, TRAIN

from fasttrain.errors import InputError
from fasttrain.evaluation.datasets import VideoSplit, read_split


def read(root: Path, **options: Any) -> VideoSplit:
    defaults: dict[str, Any] = {
        "dataset": "auto",
        "split": 1,
        "train_list": None,
        "test_list": None,
        "videos": None,
        "allow_missing": False,
    }
    return read_split(argparse.Namespace(root=root, **{**defaults, **options}))


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def lists(root: Path, train: str, test: str) -> dict[str, Path]:
    """Write a training and a test list, and the videos a.mp4 to d.mp4."""
    touch(root, *(f"{name}.mp4" for name in "abcd"))
    (root / "train.txt").write_text(train)
    (root / "test.txt").write_text(test)
    return {"train_list": root / "train.txt", "test_list": root / "test.txt"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_detected_and_read(layout: str, tmp_path: Path) -> None:
    root = LAYOUTS[layout](tmp_path / layout)
    options = {"train_list": root / "train.txt", "test_list": root / "test.txt"} if layout == "list" else {}
    split = read(root, **options)
    assert split.layout == layout
    assert len(split.classes) == len(CLASSES)
    for videos, count in ((split.train, TRAIN), (split.test, TEST)):
        assert [video.label for video in videos] == [label for label in range(3) for _ in range(count)]
    assert len({video.path for video in (*split.train, *split.test)}) == 3 * (TRAIN + TEST)
    named = read(root, **options, dataset=layout)
    assert [video.name for video in named.train] == [video.name for video in split.train]


@pytest.mark.parametrize("layout", ["ucf101", "hmdb51"])
def test_frame_folders_without_class_folders(layout: str, tmp_path: Path) -> None:
    root, flat = LAYOUTS[layout](tmp_path / layout), tmp_path / "jpegs_256"
    split = read(root)
    for video in (*split.train, *split.test):
        touch(flat / Path(video.name).stem, "00000.jpg")
    split_of_frames = read(root, videos=flat)
    assert [video.name for video in split_of_frames.train] == [video.name for video in split.train]


@pytest.mark.parametrize("stored", ["HandStandPushups", "HandstandPushups"])
@pytest.mark.parametrize("layout", ["{0}/v_{0}_g01_c0{1}.avi", "v_{0}_g01_c0{1}/frame000001.jpg"])
def test_the_class_of_ucf101_with_two_spellings(tmp_path: Path, stored: str, layout: str) -> None:
    listed = "HandstandPushups/v_HandStandPushups_g01_c0"
    (tmp_path / "classInd.txt").write_text("1 HandstandPushups\n")
    (tmp_path / "trainlist01.txt").write_text(f"{listed}1.avi 1\n{listed}3.avi 1\n")
    (tmp_path / "testlist01.txt").write_text(f"{listed}2.avi\n")
    touch(tmp_path, *(layout.format(stored, number) for number in (1, 2)))
    split = read(tmp_path, allow_missing=True)
    assert [video.name for video in (*split.train, *split.test)] == [f"{listed}1.avi", f"{listed}2.avi"]
    assert split.missing == [f"{listed}3.avi"]


def test_case_is_ignored_only_if_one_video_matches(tmp_path: Path) -> None:
    touch(tmp_path, "x/Clip.mp4", "x/clip.mp4", "y/Only.mp4", "y/Other.mp4")
    options = lists(tmp_path, "x/clip.mp4 1\nx/CLIP.mp4 1\nonly.mp4 1\n", "OTHER.avi 1\n")
    split = read(tmp_path, **options, allow_missing=True)
    assert [video.path for video in split.train] == [tmp_path / "x/clip.mp4", tmp_path / "y/Only.mp4"]
    assert [video.path for video in split.test] == [tmp_path / "y/Other.mp4"]
    assert split.missing == ["x/CLIP.mp4: matches x/Clip.mp4 and x/clip.mp4"]


def test_skipped_frame_folders_are_missing_with_the_reason(tmp_path: Path) -> None:
    touch(tmp_path, *(f"deep/e/{kind}_{number}.jpg" for kind in ("left", "right") for number in range(3)))
    touch(tmp_path, "elsewhere/E.mp4")
    split = read(tmp_path, **lists(tmp_path, "e.mp4 x\na.mp4 x\n", "b.mp4 x\n"), allow_missing=True)
    (missing,) = split.missing
    assert missing.startswith("e.mp4: contains several kinds of images")


def test_ucf101_classes_are_sorted_by_number(tmp_path: Path) -> None:
    root = tmp_path
    touch(root, "videos/B/b1.mp4", "videos/A/a1.mp4", "videos/A/a2.mp4", "videos/B/b2.mp4")
    (root / "classInd.txt").write_text("1 B\n2 A\n")
    (root / "trainlist02.txt").write_text("A/a1.avi 2\nB/b1.avi 1\n")
    (root / "testlist02.txt").write_text("A/a2.avi\nB/b2.avi\n")
    split = read(root, split=2)
    assert split.classes == ["B", "A"]
    assert [(video.path.name, video.label) for video in split.test] == [("a2.mp4", 1), ("b2.mp4", 0)]


def test_suffix_of_lists_determines_their_layout(tmp_path: Path) -> None:
    roots = {name: LAYOUTS[name](tmp_path / name) for name in ("kinetics", "ssv2")}
    csv, labels = roots["kinetics"] / "annotations", roots["ssv2"] / "labels"
    split = read(roots["kinetics"], train_list=csv / "train.csv", test_list=csv / "val.csv")
    assert split.layout == "kinetics"
    split = read(roots["ssv2"], train_list=labels / "train.json", test_list=labels / "validation.json")
    assert split.layout == "ssv2"
    options = lists(tmp_path, "a.mp4 x\n", "b.mp4 x\n")
    (tmp_path / "run_test_split1.txt").write_text("x.avi 1\n")
    assert read(tmp_path, **options).layout == "list"
    with pytest.raises(InputError, match="hmdb51 has a list per class"):
        read(tmp_path, **options, dataset="hmdb51")


def test_plain_lists(tmp_path: Path) -> None:
    """Classes sorted by number, a comment, an absolute path and a name that begins with #, as in HMDB51."""
    touch(tmp_path, "#20 Rhythm clap.avi")
    options = lists(tmp_path, f"# a.mp4 9\n#20 Rhythm clap.avi 10\n{tmp_path}/a.mp4 9\n", "b.mp4 9\n")
    split = read(tmp_path, **options)
    assert split.classes == ["9", "10"]
    assert [video.path for video in split.train] == [tmp_path / "#20 Rhythm clap.avi", tmp_path / "a.mp4"]


def test_labels_of_thousands_of_digits_are_names(tmp_path: Path) -> None:
    long = "9" * 5000
    split = read(tmp_path, **lists(tmp_path, f"a.mp4 {long}\n", f"b.mp4 {long}\n"))
    assert split.classes == [long]


def test_kinetics_without_class_folders(tmp_path: Path) -> None:
    """The published archives have no class folders."""
    for which, video in (("train", "a"), ("val", "b")):
        lines = f"label,youtube_id,time_start,time_end,split\nclay pottery,{video},1,11,{which}\n"
        (tmp_path / f"{which}.csv").write_text(lines)
        touch(tmp_path, f"{which}/{video}_000001_000011.mp4")
    split = read(tmp_path)
    assert split.train[0].path == tmp_path / "train/a_000001_000011.mp4"
    assert split.test[0].path == tmp_path / "val/b_000001_000011.mp4"
    # The publishers' tool sorts videos into class folders and replaces damaged ones, so its files win.
    touch(tmp_path, "videos/train/clay pottery/a_000001_000011.mp4")
    assert read(tmp_path).train[0].path.parent == tmp_path / "videos/train/clay pottery"


def test_missing_videos(tmp_path: Path) -> None:
    options = lists(tmp_path, "folder/b.mp4 x\n", "b.mp4 x\n")
    with pytest.raises(InputError, match=r"listed videos that are missing in .*: 1 "):
        read(tmp_path, **options)
    options = lists(tmp_path, "a.mp4 x\ngone.mp4 x\n", "b.mp4 x\nlost.mp4 x\n")
    with pytest.raises(InputError, match=r": 2 \(for example gone.mp4, lost.mp4\). .*--allow-missing"):
        read(tmp_path, **options)
    split = read(tmp_path, **options, allow_missing=True)
    assert split.missing == ["gone.mp4", "lost.mp4"]
    assert (len(split.train), len(split.test)) == (1, 1)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(InputError, match=r"listed videos that are missing in .*: 4 "):
        read(tmp_path, **options, videos=tmp_path / "elsewhere", allow_missing=True)


def test_videos_are_matched_by_the_end_of_their_path(tmp_path: Path) -> None:
    options = lists(tmp_path, "deep/e.avi x\n", "b.mp4 x\n")
    touch(tmp_path, "one/deep/e.mp4", "one/e.mp4")
    assert read(tmp_path, **options).train[0].path == tmp_path / "one/deep/e.mp4"
    touch(tmp_path, "two/deep/e.mp4")
    with pytest.raises(InputError, match=r"match several files: 1 \(for example deep/e.avi"):
        read(tmp_path, **options)


@pytest.mark.parametrize(
    ("train", "test", "part"),
    [
        ("", "a.mp4 x\n", "the training list is empty"),
        ("a.mp4 x\n", "# none\n", "the test list is empty"),
        ("a.mp4 x\nb.mp4 x\n", "b.mp4 x\n", "video 'b.mp4' is in both the training and the test list"),
        ("a.mp4\n", "b.mp4 x\n", "'a.mp4'; expected `path label`"),
    ],
)
def test_invalid_lists(train: str, test: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=part):
        read(tmp_path, **lists(tmp_path, train, test))


def test_unknown_and_ambiguous_layouts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"contains no lists of a supported dataset\. Choose the layout"):
        read(tmp_path)
    for layout, part in (("ucf101", "classInd.txt"), ("list", "--train-list and --test-list")):
        with pytest.raises(InputError, match=part):
            read(tmp_path, dataset=layout)
    with pytest.raises(InputError, match=r"nowhere.txt' cannot be read"):
        read(tmp_path, train_list=tmp_path / "nowhere.txt", test_list=tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match=r"a.mp4' is not a folder. Pass .* as --videos"):
        read(tmp_path, **lists(tmp_path, "a.mp4 x\n", "b.mp4 x\n"), videos=tmp_path / "a.mp4")
    (tmp_path / "classInd.txt").write_text("1 A\n")
    (tmp_path / "A_test_split1.txt").write_text("a.avi 1\n")
    with pytest.raises(InputError, match="the lists of ucf101 and hmdb51"):
        read(tmp_path)


KINETICS = "label,youtube_id,time_start,time_end,split"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"classInd.txt": "1 A", "trainlist01.txt": "A/a.avi 1", "testlist01.txt": "B/b.avi"},
            r"video 'B/b.avi' has label 'B'; expected a label of the dataset \(1 in total\)",
        ),
        (
            {"classInd.txt": "1 A", "trainlist01.txt": "b.avi", "testlist01.txt": ""},
            "'b.avi'; expected CLASS/NAME.avi",
        ),
        ({"A_test_split1.txt": "a.avi 3"}, "'a.avi 3'; expected a video and 0, 1 or 2"),
        ({"train.csv": "name,id\nx,y", "val.csv": ""}, "expected the columns label"),
        ({"train.csv": KINETICS, "val.csv": KINETICS}, "the training list is empty"),
        ({"train.csv": f"{KINETICS}\nx,y,soon,9,train", "val.csv": ""}, "'soon'.*expected the columns label"),
        (
            {"labels.json": '{"A": "0"}', "train.json": '[{"id": "1"}]', "validation.json": "[]"},
            "expected objects with id and template",
        ),
        ({"labels.json": '{"A": '}, "labels.json' is not valid JSON"),
        ({"labels.json": "[" * 99_999}, "labels.json' is not valid JSON .it is nested too deeply"),
        ({"labels.json": '["A"]'}, "labels.json': expected a JSON object"),
        (
            {"labels.json": '{"A": "many"}'},
            "labels.json': malformed row .*'many'.*templates",
        ),
        ({"labels.json": '{"A": null}'}, "labels.json': malformed row .*None.*templates with their numbers"),
        (
            {"labels.json": "{}", "train.json": "{}", "validation.json": "[]"},
            "train.json': expected a JSON array",
        ),
    ],
)
def test_malformed_lists(files: dict[str, str], message: str, tmp_path: Path) -> None:
    touch(tmp_path, "A/a.avi")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read(tmp_path)
