"""The commands and their options.

They are apart from the modules that implement the commands, because importing these takes seconds: this
module imports only the standard library. The text above the options in --help is the docstring of the
command's module.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

# The settings of label propagation: preceding frames, grid cells, keys per query (for DAVIS), softmax
# temperature.
CONTEXT, RADIUS, TOPK, TEMPERATURE = 20, 20.0, 7, 0.7
# Those of the k-NN classifier.
NEIGHBOURS, KNN_TEMPERATURE = (10, 20, 100, 200), 0.07
# The maximum number of iterations of L-BFGS for linear classifiers.
MAX_ITERATIONS = 1000
# Names that other modules define: layouts of datasets, thresholds of the mAP, activation functions.
LAYOUTS = ("ucf101", "hmdb51", "kinetics", "ssv2", "list")
TEMPORAL_IOU = ("thumos", "activitynet")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")


def docstring(module: str) -> str:
    """Return the docstring of a module of fasttrain without importing it."""
    path = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def new_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command."""
    module, _, add_options = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"fasttrain {name}", description=docstring(module))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_options(parser)
    return parser


class _PrintKeys(argparse.Action):
    """Print the table of recipe keys and exit."""

    def __call__(self, *_: Any) -> None:
        from fasttrain.recipe import keys_table

        print(keys_table())
        raise SystemExit


def add_train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, such as recipes/dinov2.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        # Without a default, argparse would call this argument required in its error messages.
        default=[],
        metavar="KEY=VALUE",
        help="recipe keys to override, such as data.source=PATH train.epochs=3",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="profile a few early steps, and write a Chrome trace and a summary to OUTPUT/profile",
    )
    parser.add_argument(
        "--keys", nargs=0, action=_PrintKeys, help="print all recipe keys as a table and exit"
    )


def add_pack_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder of frame folders or video files at any depth, video file, or text file with one frame "
        "folder or video file per line; with --check, a packed set",
    )
    parser.add_argument(
        "destination",
        metavar="DESTINATION",
        type=Path,
        nargs="?",
        help="folder for the packed set; not used with --check",
    )
    kinds = ("auto", "folders", "list", "videos")
    parser.add_argument(
        "--kind", choices=kinds, default="auto", help="kind of the source; auto detects it (default: auto)"
    )
    for option, metavar, default, help in (
        ("--frames", "K", PackOptions.frames, "number of evenly spaced frames per video; 0 keeps all frames"),
        (
            "--short-side",
            "PIXELS",
            PackOptions.short_side,
            "short side to which larger frames are downscaled",
        ),
        ("--quality", "Q", PackOptions.quality, "JPEG quality, 1 to 100"),
        (
            "--shard-size",
            "MIB",
            PackOptions.shard_bytes >> 20,
            "size of a shard file in MiB; the video that reaches this size is the last one in the file",
        ),
        ("--workers", "N", 0, "videos to encode at a time, each held in memory; 0 uses one per core"),
    ):
        help = f"{help} (default: {default})"
        parser.add_argument(option, metavar=metavar, default=default, type=int, help=help)
    parser.add_argument(
        "--shard",
        dest="share",
        metavar="I/N",
        default="1/1",
        type=_share,
        help="pack only share I of N of the source, to divide the work among N machines; each share has its "
        "own shard files (default: 1/1)",
    )
    parser.add_argument(
        "--decoder",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="where to decode video files: cpu uses PyAV; gpu uses NVDEC, but PyAV for videos that NVDEC "
        "does not support; auto uses gpu if NVDEC and DALI are available, otherwise cpu, whereas "
        "data.decoder=auto in training always uses cpu (default: auto)",
    )
    parser.add_argument(
        "--check", action="store_true", help="verify every frame of the packed set SOURCE instead of packing"
    )


def _share(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 1 to N, such as 2/4")
    return int(number), int(count)


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """The options that determine the content of a packed set."""

    frames: int = 0
    """Number of evenly spaced frames to keep of each video; 0 keeps all."""
    short_side: int = 256
    """Short side in pixels to which larger frames are downscaled."""
    quality: int = 90
    """JPEG quality, 1..100."""
    shard_bytes: int = 2**30
    """Size at which a shard is full. The video that reaches it is the last one in the shard."""
    decoder: Literal["pyav", "nvdec"] = "pyav"


def add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a training run")
    parser.add_argument(
        "--output",
        type=Path,
        default="report.html",
        metavar="FILE",
        help="HTML file to write (default: %(default)s)",
    )


def add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="output folder of a training run")
    parser.add_argument("file", metavar="FILE", help="file to write, such as encoder.pt2")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"),
        help="frame size in pixels, a multiple of the patch size (default: the training crop)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", metavar="PATH", help="weights of the backbone (default: those used in training)"
    )


def add_demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys to override, such as train.epochs=3"
    )
    parser.add_argument(
        "--recipe",
        metavar="RECIPE",
        default="recipes/quickstart.yaml",
        help="recipe to train (default: %(default)s)",
    )


def add_eval_options(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", required=True, metavar="{" + ",".join(TASKS) + "}")
    for name, (module, summary, add_options) in TASKS.items():
        task_parser = tasks.add_parser(
            name,
            help=summary,
            description=docstring(module),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        task_parser.add_argument(
            "--root", type=Path, required=True, metavar="DATASET", help="path of the dataset"
        )
        _add_model_options(task_parser)
        task_parser.add_argument(
            "--output",
            type=Path,
            metavar="FOLDER",
            help="folder for the results (default: eval in RUN or, without --run, in the working directory)",
        )
        add_options(task_parser)


def add_davis_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--year",
        choices=("2016", "2017"),
        default="2017",
        help="release of the dataset; 2016 merges all objects of a sequence (default: 2017)",
    )
    parser.add_argument(
        "--subset", default="val", help="subset of the sequences, listed in SUBSET.txt (default: val)"
    )
    for option, default in (("--height", 480), ("--width", 880)):
        help = f"{option[2:]} to which frames are resized (default: {default})"
        parser.add_argument(option, type=int, metavar="PIXELS", default=default, help=help)
    _add_propagation_options(parser, topk=TOPK)


def add_vip_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--subset",
        default="val",
        help="subset of the videos, listed in lists/SUBSET_videos.txt (default: val)",
    )
    parser.add_argument(
        "--list",
        type=Path,
        metavar="FILE",
        help="text file with one video name or path per line, used instead of --subset",
    )
    parser.add_argument(
        "--long-side",
        type=int,
        metavar="PIXELS",
        default=880,
        help="long side to which frames are resized (default: 880)",
    )
    _add_propagation_options(parser, topk=10)


def add_jhmdb_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="test split (default: 1)")
    parser.add_argument(
        "--list",
        type=Path,
        metavar="FILE",
        help="list of test clips to use instead of --split, one per line (CLASS/CLIP or videowalk's format)",
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        default=320,
        help="side of the squares to which frames are resized (default: 320)",
    )
    parser.add_argument(
        "--sigma",
        type=float,
        metavar="CELLS",
        default=0.5,
        help="standard deviation of a joint's Gaussian, in grid cells (default: 0.5)",
    )
    _add_propagation_options(parser, topk=TOPK)


def _add_propagation_options(parser: argparse.ArgumentParser, *, topk: int) -> None:
    """Add the propagation settings. The default of `topk` differs between benchmarks."""
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        default=CONTEXT,
        help="number of preceding frames to attend to, besides the first frame (default: %(default)s)",
    )
    parser.add_argument(
        "--radius",
        type=float,
        metavar="CELLS",
        default=RADIUS,
        help="radius of the search in the preceding frames, in grid cells (default: %(default)g)",
    )
    parser.add_argument(
        "--topk",
        type=int,
        metavar="K",
        default=topk,
        help="number of most similar tokens whose labels are combined (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        default=TEMPERATURE,
        help="temperature of the softmax that weights these labels (default: %(default)s)",
    )
    parser.add_argument(
        "--pictures",
        type=int,
        metavar="N",
        default=8,
        help="number of sequences to draw, evenly spaced over the list (default: %(default)s)",
    )


def add_consistency_options(parser: argparse.ArgumentParser) -> None:
    for option, metavar, default, help in (
        ("--num-frames", "N", 40, "number of evenly spaced frames per video"),
        ("--num-videos", "N", 1000, "maximum number of videos, evenly spaced over the source"),
        ("--image-size", "PIXELS", 224, "side of the centre crop"),
    ):
        help = f"{help} (default: {default})"
        parser.add_argument(option, type=int, metavar=metavar, default=default, help=help)


def add_retrieval_options(parser: argparse.ArgumentParser) -> None:
    _add_video_options(parser)
    _add_feature_options(parser)
    help = "number of evenly spaced frames per video (default: 16)"
    parser.add_argument("--num-frames", type=int, metavar="N", default=16, help=help)


def add_probe_options(parser: argparse.ArgumentParser) -> None:
    add_retrieval_options(parser)
    parser.add_argument(
        "--neighbours",
        type=int,
        nargs="+",
        default=list(NEIGHBOURS),
        metavar="K",
        help="values of k for k-NN; those above the number of training videos are skipped "
        f"(default: {' '.join(map(str, NEIGHBOURS))})",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=KNN_TEMPERATURE,
        metavar="T",
        help="temperature of the k-NN votes (default: %(default)s)",
    )
    _add_classifier_options(parser)


def add_localization_options(parser: argparse.ArgumentParser) -> None:
    _add_feature_options(parser)
    _add_frame_options(parser)
    parser.add_argument(
        "--stride", type=int, default=1, metavar="N", help="encode every N-th frame (default: 1)"
    )
    parser.add_argument(
        "--smooth",
        type=int,
        default=1,
        metavar="N",
        help="average the predictions over N encoded frames (default: 1)",
    )
    parser.add_argument(
        "--max-train-frames",
        type=int,
        default=200_000,
        metavar="N",
        help="fit the classifier to at most N evenly spaced frames (default: %(default)s)",
    )
    parser.add_argument(
        "--tiou",
        choices=TEMPORAL_IOU,
        default="thumos",
        help="IoU thresholds of the mAP: thumos 0.1 to 0.7, activitynet 0.5 to 0.95 (default: thumos)",
    )
    _add_classifier_options(parser)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    encoder = parser.add_mutually_exclusive_group(required=True)
    encoder.add_argument("--run", type=Path, metavar="RUN", help="output folder of a training run")
    encoder.add_argument(
        "--backbone",
        metavar="NAME",
        help="backbone to evaluate without a run: mae, dino, ... or a timm ViT",
    )
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="weights of the backbone: a path, hf://..., timm://... or random (default: those of the run, or "
        "random for --backbone)",
    )
    parser.add_argument(
        "--projection",
        type=Path,
        metavar="FILE",
        help="projection to use with --backbone (a projection.safetensors)",
    )
    parser.add_argument(
        "--num-heads",
        type=int,
        metavar="N",
        help="number of attention heads, like backbone.num_heads in a recipe",
    )
    parser.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        help="activation function of the MLPs, like backbone.activation",
    )
    for option in ("--mean", "--std"):
        parser.add_argument(
            option, type=float, nargs=3, metavar=("R", "G", "B"),
            help="statistic of RGB values from 0 to 1, like the key of this name in a recipe's backbone",
        )  # fmt: skip
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--baseline-only", action="store_true", help="evaluate only the frozen backbone")
    only.add_argument("--projection-only", action="store_true", help="evaluate only the projected features")
    parser.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="device; auto uses cuda if available (default: auto)",
    )


def _add_feature_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-size", type=int, metavar="PIXELS", default=224, help="side of the centre crop (default: 224)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="folder of cached features, which tasks and runs can share; all processes need access to it "
        "(default: cache in the folder of the results)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="precision of the encoder (default: fp32)",
    )
    for option, default, help in (
        ("--batch-size", 32, "number of frames per batch"),
        ("--workers", 0, "number of decoding threads; 0 uses one per core, up to 16"),
    ):
        help = f"{help} (default: {default})"
        parser.add_argument(option, type=int, metavar="N", default=default, help=help)


def _add_video_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of datasets with a label per video."""
    parser.add_argument(
        "--dataset",
        choices=("auto", *LAYOUTS),
        default="auto",
        help="layout of the lists; auto detects it from their names (default: auto)",
    )
    parser.add_argument(
        "--split", type=int, choices=(1, 2, 3), default=1, help="split of UCF101 or HMDB51 (default: 1)"
    )
    _add_list_options(
        parser, "list of training videos: `path label` per line, CSV as in kinetics or JSON as in ssv2"
    )
    parser.add_argument("--allow-missing", action="store_true", help="skip listed videos that are missing")


def _add_frame_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of datasets with a label per frame."""
    parser.set_defaults(dataset="frames", allow_missing=False)
    parser.add_argument(
        "--split", default="1", metavar="N", help="split, listed in splits/*.splitN.bundle (default: 1)"
    )
    _add_list_options(parser, "list of training videos to use instead of splits/train.splitN.bundle")
    parser.add_argument(
        "--background",
        nargs="*",
        default=None,
        metavar="LABEL",
        help="labels whose segments are not scored; without LABEL, all are scored (default: the label "
        "background, if there is one, as in MS-TCN)",
    )


def _add_list_options(parser: argparse.ArgumentParser, train_help: str) -> None:
    parser.epilog = docstring("fasttrain.evaluation.datasets")
    parser.add_argument("--train-list", type=Path, metavar="FILE", help=train_help)
    parser.add_argument(
        "--test-list", type=Path, metavar="FILE", help="list of test videos, in the format of --train-list"
    )
    parser.add_argument(
        "--videos",
        type=Path,
        metavar="FOLDER",
        help="folder or packed set of the videos (default: the path given as --root)",
    )


def _add_classifier_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-iterations",
        type=int,
        metavar="N",
        default=MAX_ITERATIONS,
        help="maximum number of L-BFGS iterations (default: %(default)s)",
    )


def add_no_options(parser: argparse.ArgumentParser) -> None:
    """Do nothing, for commands without arguments."""


class Command(NamedTuple):
    """A command, or a task of `fasttrain eval`."""

    module: str
    """Its function `run` runs it."""
    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]


# In the order of the help, like `COMMANDS`.
TASKS = {
    "davis": Command(
        "fasttrain.evaluation.davis",
        "video object segmentation by label propagation (J and F)",
        add_davis_options,
    ),
    "vip": Command(
        "fasttrain.evaluation.vip",
        "body part segmentation by label propagation (mean IoU, IoU per class)",
        add_vip_options,
    ),
    "jhmdb": Command(
        "fasttrain.evaluation.jhmdb",
        "human pose tracking by label propagation (PCK, mean and per joint)",
        add_jhmdb_options,
    ),
    "consistency": Command(
        "fasttrain.evaluation.consistency",
        "consistency and separability (distances within and between videos)",
        add_consistency_options,
    ),
    "retrieval": Command(
        "fasttrain.evaluation.retrieval",
        "video retrieval by nearest neighbours (recall at 1, 5 and 10 in percent)",
        add_retrieval_options,
    ),
    "probe": Command(
        "fasttrain.evaluation.classification",
        "video classification by k-NN and a linear probe (accuracy in percent)",
        add_probe_options,
    ),
    "localization": Command(
        "fasttrain.evaluation.localization",
        "temporal action localisation (frame accuracy, F1, edit, mAP in percent)",
        add_localization_options,
    ),
}
COMMANDS = {
    "train": Command("fasttrain.__main__", "train a projection (the default command)", add_train_options),
    "pack": Command(
        "fasttrain.data.pack",
        "convert videos or frame folders into a packed set for fast access",
        add_pack_options,
    ),
    "eval": Command(
        "fasttrain.evaluation.command",
        "evaluate a run on a benchmark, before and after projection",
        add_eval_options,
    ),
    "report": Command("fasttrain.evaluation.report", "summarise runs in one HTML page", add_report_options),
    "export": Command(
        "fasttrain.tools.export",
        "export a trained video encoder to a single self-contained file",
        add_export_options,
    ),
    "doctor": Command(
        "fasttrain.tools.doctor",
        "list installed and missing components and what they affect",
        add_no_options,
    ),
    "schema": Command(
        "fasttrain.tools.schema", "print the JSON schema of recipes, for editors", add_no_options
    ),
    "demo": Command(
        "fasttrain.tools.demo",
        "train on the clips in the package and evaluate on others",
        add_demo_options,
    ),
}
