"""The commands and their options.

They are apart from the modules that implement the commands, because importing these takes seconds: this
module imports little but the standard library. The text above the options in --help is the docstring of the
command's module.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fasttrain.files import is_url

# The settings of label propagation: preceding frames, grid cells, keys per query (for DAVIS), softmax
# temperature.
CONTEXT, RADIUS, TOPK, TEMPERATURE = 20, 20.0, 7, 0.7
# Those of the k-NN classifier.
NEIGHBOURS, KNN_TEMPERATURE = (10, 20, 100, 200), 0.07
# The short side in pixels to which whole frames are resized for the features of a video.
SHORT_SIDE = 224
# The maximum number of iterations of L-BFGS for linear classifiers.
MAX_ITERATIONS = 1000
# The number of frame pairs from which the closed form is computed.
FIT_PAIRS = 2048
# Names that other modules define: layouts of datasets, thresholds of the mAP.
LAYOUTS = ("ucf101", "hmdb51", "kinetics", "ssv2", "list")
TEMPORAL_IOU = ("thumos", "activitynet")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and adds the default to the help of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, []) and action.const is None
        return super()._get_help_string(action) if has_default else action.help


class _Parser(argparse.ArgumentParser):
    """Refuses URLs where paths are expected: `Path` would turn s3://bucket into s3:/bucket."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", Path, _local_path)


class _TaskParser(_Parser):
    """Reports unknown options with its own usage; argparse leaves them to the parser of the command."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown


def _local_path(text: str) -> Path:
    if is_url(text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a path on this machine. Copy or mount it. Only training, embed, "
            "analyse, eval consistency --root and eval --videos read packed sets and frame lists from URLs"
        )
    return Path(text)


def path_or_url(text: str) -> Path | str:
    return text if is_url(text) else Path(text)


def docstring(module: str) -> str:
    """Return the docstring of a module of fasttrain without importing it."""
    path = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def new_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command."""
    module, _, add_options = COMMANDS[name]
    parser = _Parser(prog=f"fasttrain {name}", description=docstring(module), formatter_class=HelpFormatter)
    add_options(parser)
    return parser


def _add_numbers(parser: argparse.ArgumentParser, *options: tuple[str, str, float, str]) -> None:
    """Add options that take a number: the name, a word for the number, the default and the help."""
    for option, metavar, default, help in options:
        parser.add_argument(option, metavar=metavar, type=type(default), default=default, help=help)


class _PrintKeys(argparse.Action):
    """Print the table of recipe keys and exit."""

    def __call__(self, *_: Any) -> None:
        from fasttrain.recipe import keys_table

        print(keys_table())
        raise SystemExit


def _add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        # Without a default, argparse would call this argument required in its error messages.
        default=[],
        metavar="KEY=VALUE",
        help=f"recipe keys to override, such as {example}",
    )


def add_train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of a recipe: dinov2")
    _add_overrides(parser, "data.source=PATH train.epochs=3")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="profile a few early steps, and write a Chrome trace and a summary to OUTPUT/profile",
    )
    parser.add_argument(
        "--keys", nargs=0, action=_PrintKeys, help="print all recipe keys as a table and exit"
    )


def add_fit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of a recipe: dinov2")
    _add_overrides(parser, "data.source=PATH output=DIR")
    _add_numbers(parser, ("--pairs", "N", FIT_PAIRS, "number of frame pairs to encode; at most one epoch is"))


def add_demo_options(parser: argparse.ArgumentParser) -> None:
    _add_overrides(parser, "train.epochs=3")
    parser.add_argument(
        "--recipe", metavar="RECIPE", default="quickstart", help="recipe to train, a file or a name"
    )


def add_pack_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder of frame folders or video files at any depth, video file, text file with one frame "
        "folder or video file per line, list of Kinetics (CSV), or WebDataset: a tar, a folder or list of "
        "tars, or a pattern such as train-{000000..000009}.tar; with --check, a packed set",
    )
    parser.add_argument(
        "destination",
        type=Path,
        nargs="?",
        metavar="DESTINATION",
        help="folder for the packed set; not used with --check",
    )
    kinds = ("auto", "folders", "list", "videos")
    parser.add_argument("--kind", choices=kinds, default="auto", help="kind of the source; auto detects it")
    size = "size of a shard file in MiB; the video that reaches this size is the last one in the file"
    _add_numbers(
        parser,
        ("--frames", "K", PackOptions.frames, "number of evenly spaced frames per video; 0 keeps all frames"),
        (
            "--short-side",
            "PIXELS",
            PackOptions.short_side,
            "short side to which larger frames are downscaled",
        ),
        ("--quality", "Q", PackOptions.quality, "JPEG quality, 1 to 100"),
        ("--shard-size", "MIB", PackOptions.shard_bytes >> 20, size),
        ("--workers", "N", 0, "videos to encode at a time, each held in memory; 0 uses one per core"),
    )
    parser.add_argument(
        "--shard",
        dest="share",
        metavar="I/N",
        default="1/1",
        type=_share,
        help="pack only share I of N of the source, to divide the work among N machines; each share has its "
        "own shard files",
    )
    parser.add_argument(
        "--decoder",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="where to decode video files: cpu uses PyAV; gpu uses NVDEC, but PyAV for videos that NVDEC "
        "does not support; auto uses gpu if NVDEC and DALI are available, otherwise cpu, whereas "
        "data.decoder=auto in training always uses cpu",
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
        "--output", type=Path, default="report.html", metavar="FILE", help="HTML file to write"
    )


def add_export_options(parser: argparse.ArgumentParser) -> None:
    help = "output folder of a training run, or hf://owner/repo"
    parser.add_argument("run", metavar="RUN", help=help)
    help = "file to write, such as encoder.pt2 (torch.export) or encoder.onnx"
    parser.add_argument("file", metavar="FILE", help=help)
    help = "frame size in pixels, a multiple of the patch size (default: the training crop)"
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help=help)
    help = "weights of the backbone (default: those used in training)"
    parser.add_argument("--weights", metavar="PATH", help=help)


def add_push_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of a training run")
    help = "repository on the Hugging Face Hub, which is created if it does not exist"
    parser.add_argument("repository", metavar="USER/NAME", help=help)
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    help = "public location of the backbone's weights, hf://... or timm://..., if the run used a copy of them"
    parser.add_argument("--weights", metavar="LOCATION", help=help)


def add_embed_options(parser: argparse.ArgumentParser) -> None:
    help = (
        "folder of video files or frame folders at any depth, list of them, video file, or packed set; lists "
        "of frame folders and packed sets may be URLs"
    )
    parser.add_argument("videos", metavar="VIDEOS", help=help)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the features, one file per video")
    _add_model_options(parser)
    parser.set_defaults(projection_only=False)
    help = "write the tokens of the frozen backbone although there is a projection"
    parser.add_argument("--baseline-only", action="store_true", help=help)
    help = "write the mean over the tokens of each frame, (T, D), instead of the tokens, (T, h, w, D)"
    parser.add_argument("--pool", action="store_true", help=help)
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        default=[SHORT_SIDE],
        metavar="PIXELS",
        help="short side to which frames are resized, or height and width; both sides are rounded to "
        "multiples of the patch size",
    )
    help = "dtype of the written features; float32 doubles the size of the files"
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help=help)
    formats = ("safetensors", "npz")
    parser.add_argument("--format", choices=formats, default=formats[0], help="format of the files")
    help = "precision of the encoder"
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help=help)
    _add_numbers(
        parser,
        ("--stride", "N", 1, "encode every N-th frame"),
        ("--batch-size", "N", 32, "number of frames per batch"),
    )


def add_eval_options(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(
        dest="task", required=True, metavar="{" + ",".join(TASKS) + "}", parser_class=_TaskParser
    )
    for name, (module, summary, add_options) in TASKS.items():
        task_parser = tasks.add_parser(
            name, help=summary, description=docstring(module), formatter_class=HelpFormatter
        )
        task_parser.add_argument(
            "--root",
            type=path_or_url if name == "consistency" else Path,
            required=True,
            metavar="DATASET",
            help="path of the dataset",
        )
        _add_model_options(task_parser)
        only = task_parser.add_mutually_exclusive_group()
        help = "evaluate only the frozen backbone"
        only.add_argument("--baseline-only", action="store_true", help=help)
        help = "evaluate only the projected features"
        only.add_argument("--projection-only", action="store_true", help=help)
        _add_output_option(task_parser)
        add_options(task_parser)


def add_analyse_options(parser: argparse.ArgumentParser) -> None:
    help = "videos to analyse, as for data.source in training (default: those that the run was trained on)"
    parser.add_argument("root", type=path_or_url, nargs="?", metavar="SOURCE", help=help)
    _add_model_options(parser)
    parser.set_defaults(task="analyse", baseline_only=False, projection_only=False)
    _add_output_option(parser)
    _add_numbers(
        parser,
        ("--num-videos", "N", 100, "maximum number of videos, evenly spaced over the source"),
        ("--pairs", "N", 8, "number of evenly spaced frame pairs per video"),
        ("--image-size", "PIXELS", 224, "side of the centre crop"),
    )


def _add_output_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder for the results (default: RUN/eval or, without a run folder, eval in the working "
        "directory)",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_model` reads, except for the choice of features before or after."""
    encoder = parser.add_mutually_exclusive_group(required=True)
    help = "output folder of a training run, or hf://owner/repo"
    encoder.add_argument("--run", metavar="RUN", help=help)
    help = "backbone to use without a run: mae, dino, ... or a timm ViT"
    encoder.add_argument("--backbone", metavar="NAME", help=help)
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="weights of the backbone: a path, hf://..., timm://... or random (default: those of the run, or "
        "random for --backbone)",
    )
    help = (
        "projection to use with --backbone: a projection.safetensors, a run, hf://owner/repo, or "
        "cosettle://NAME for that of the paper's authors"
    )
    parser.add_argument("--projection", metavar="PATH", help=help)
    help = "number of attention heads, like backbone.num_heads in a recipe"
    parser.add_argument("--num-heads", type=int, metavar="N", help=help)
    help = "activation function of the MLPs, like backbone.activation"
    parser.add_argument("--activation", metavar="NAME", help=help)
    help = "epsilon of the LayerNorms, like backbone.layer_norm_eps"
    parser.add_argument("--layer-norm-eps", type=float, metavar="EPS", help=help)
    help = "statistic of RGB values from 0 to 1, like the key of this name in a recipe's backbone"
    for option in ("--mean", "--std"):
        parser.add_argument(option, type=float, nargs=3, metavar=("R", "G", "B"), help=help)
    devices = ("auto", "cuda", "cpu")
    help = "device; auto uses cuda if available"
    parser.add_argument("--device", choices=devices, default="auto", help=help)


# --- the options of tasks ------------------------------------------------------------------------------


def add_davis_options(parser: argparse.ArgumentParser) -> None:
    help = "release of the dataset; 2016 merges all objects of a sequence"
    parser.add_argument("--year", choices=("2016", "2017"), default="2017", help=help)
    help = "subset of the sequences, listed in SUBSET.txt"
    parser.add_argument("--subset", default="val", help=help)
    _add_numbers(
        parser,
        ("--height", "PIXELS", 480, "height to which frames are resized"),
        ("--width", "PIXELS", 880, "width to which frames are resized"),
    )
    _add_propagation_options(parser, topk=TOPK)


def add_vip_options(parser: argparse.ArgumentParser) -> None:
    help = "subset of the videos, listed in lists/SUBSET_videos.txt"
    parser.add_argument("--subset", default="val", help=help)
    help = "text file with one video name or path per line, used instead of --subset"
    parser.add_argument("--list", type=Path, metavar="FILE", help=help)
    _add_numbers(parser, ("--long-side", "PIXELS", 880, "long side to which frames are resized"))
    _add_propagation_options(parser, topk=10)


def add_jhmdb_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="test split")
    parser.add_argument(
        "--list",
        type=Path,
        metavar="FILE",
        help="list of test clips to use instead of --split, one per line (CLASS/CLIP or videowalk's format)",
    )
    _add_numbers(
        parser,
        ("--size", "PIXELS", 320, "side of the squares to which frames are resized"),
        ("--sigma", "CELLS", 0.5, "standard deviation of a joint's Gaussian, in grid cells"),
    )
    _add_propagation_options(parser, topk=TOPK)


def _add_propagation_options(parser: argparse.ArgumentParser, *, topk: int) -> None:
    """Add the propagation settings. The default of `topk` differs between benchmarks."""
    _add_numbers(
        parser,
        ("--context", "N", CONTEXT, "number of preceding frames to attend to, besides the first frame"),
        ("--radius", "CELLS", RADIUS, "radius of the search in the preceding frames, in grid cells"),
        ("--topk", "K", topk, "number of most similar tokens whose labels are combined"),
        ("--temperature", "T", TEMPERATURE, "temperature of the softmax that weights these labels"),
        ("--pictures", "N", 8, "number of sequences to draw, evenly spaced over the list"),
    )


def add_consistency_options(parser: argparse.ArgumentParser) -> None:
    _add_numbers(
        parser,
        ("--num-frames", "N", 40, "number of evenly spaced frames per video"),
        ("--num-videos", "N", 1000, "maximum number of videos, evenly spaced over the source"),
        ("--image-size", "PIXELS", 224, "side of the centre crop"),
    )


def add_retrieval_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of datasets with a label per video."""
    help = "layout of the lists; auto detects it from their names"
    parser.add_argument("--dataset", choices=("auto", *LAYOUTS), default="auto", help=help)
    help = "split of UCF101 or HMDB51"
    parser.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help=help)
    _add_list_options(
        parser, "list of training videos: `path label` per line, CSV as in kinetics or JSON as in ssv2"
    )
    parser.add_argument("--allow-missing", action="store_true", help="skip listed videos that are missing")
    _add_feature_options(parser)
    _add_numbers(parser, ("--num-frames", "N", 16, "number of evenly spaced frames per video"))


def add_probe_options(parser: argparse.ArgumentParser) -> None:
    add_retrieval_options(parser)
    parser.add_argument(
        "--neighbours",
        type=int,
        nargs="+",
        default=list(NEIGHBOURS),
        metavar="K",
        help="values of k for k-NN; those above the number of training videos are skipped",
    )
    _add_numbers(
        parser,
        ("--temperature", "T", KNN_TEMPERATURE, "temperature of the k-NN votes"),
        ("--max-iterations", "N", MAX_ITERATIONS, "maximum number of L-BFGS iterations"),
    )


def add_localization_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of datasets with a label per frame."""
    parser.set_defaults(dataset="frames", allow_missing=False)
    parser.add_argument("--split", default="1", metavar="N", help="split, listed in splits/*.splitN.bundle")
    _add_list_options(parser, "list of training videos to use instead of splits/train.splitN.bundle")
    parser.add_argument(
        "--background",
        nargs="*",
        metavar="LABEL",
        help="labels whose segments are not scored; without LABEL, all are scored (default: the label "
        "background, if there is one, as in MS-TCN)",
    )
    _add_feature_options(parser)
    _add_numbers(
        parser,
        ("--stride", "N", 1, "encode every N-th frame"),
        ("--smooth", "N", 1, "average the predictions over N encoded frames"),
        ("--max-train-frames", "N", 200_000, "fit the classifier to at most N evenly spaced frames"),
        ("--max-iterations", "N", MAX_ITERATIONS, "maximum number of L-BFGS iterations"),
    )
    help = "IoU thresholds of the mAP: thumos 0.1 to 0.7, activitynet 0.5 to 0.95"
    parser.add_argument("--tiou", choices=TEMPORAL_IOU, default="thumos", help=help)


def _add_list_options(parser: argparse.ArgumentParser, train_help: str) -> None:
    parser.epilog = docstring("fasttrain.evaluation.datasets")
    parser.add_argument("--train-list", type=Path, metavar="FILE", help=train_help)
    help = "list of test videos, in the format of --train-list"
    parser.add_argument("--test-list", type=Path, metavar="FILE", help=help)
    help = "folder of the videos, or path or URL of a packed set (default: the path given as --root)"
    parser.add_argument("--videos", type=path_or_url, metavar="FOLDER", help=help)


def _add_feature_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="folder of cached features, which tasks and runs can share; all processes need access to it "
        "(default: cache in the folder of the results)",
    )
    help = "precision of the encoder"
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help=help)
    _add_numbers(
        parser,
        ("--image-size", "PIXELS", 224, "side of the centre crop"),
        ("--batch-size", "N", 32, "number of frames per batch"),
        ("--workers", "N", 0, "number of decoding threads; 0 uses one per core, up to 16"),
    )


def add_no_options(parser: argparse.ArgumentParser) -> None:
    """Do nothing, for commands without arguments."""


# --- the commands --------------------------------------------------------------------------------------


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
    "train": Command("fasttrain.training", "train a projection (the default command)", add_train_options),
    "fit": Command(
        "fasttrain.fitting",
        "compute a projection in closed form, without training",
        add_fit_options,
    ),
    "pack": Command(
        "fasttrain.data.pack",
        "convert videos, frame folders or tars into a packed set for fast access",
        add_pack_options,
    ),
    "eval": Command(
        "fasttrain.evaluation.command",
        "evaluate a run on a benchmark, before and after projection",
        add_eval_options,
    ),
    "analyse": Command(
        "fasttrain.evaluation.analyse",
        "predict from videos whether a projection will help, and what will limit it",
        add_analyse_options,
    ),
    "embed": Command(
        "fasttrain.tools.embed", "write the features of videos, one file per video", add_embed_options
    ),
    "report": Command("fasttrain.evaluation.report", "summarise runs in one HTML page", add_report_options),
    "export": Command(
        "fasttrain.tools.export",
        "export a trained video encoder to a single self-contained file",
        add_export_options,
    ),
    "push": Command("fasttrain.tools.push", "publish a run on the Hugging Face Hub", add_push_options),
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
