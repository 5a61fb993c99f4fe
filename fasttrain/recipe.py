"""A recipe: strict YAML into frozen dataclasses. Every default of the software stands here, once.

`load_recipe(path, overrides)` reads a file (and the file it names under `base`), applies `key=value`
overrides, and checks every key, type and range. An error names the dotted path and the nearest known key.
The defaults are the paper's (Co-Settle, arXiv 2603.26597). The text beneath a field is its documentation;
the README's table is made from it.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from fasttrain.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Closed or open bounds of a number; `None` means unbounded on that side."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False

    def __str__(self) -> str:
        low = "" if self.low is None else f"{'above' if self.open_low else 'at least'} {self.low:g}"
        high = "" if self.high is None else f"at most {self.high:g}"
        return " and ".join(part for part in (low, high) if part)

    def holds(self, value: float) -> bool:
        above = self.low is None or value > self.low or (value == self.low and not self.open_low)
        return above and (self.high is None or value <= self.high)


# Marks a key that may change when a run is resumed: it does not alter what the run computes.
MAY_CHANGE = "may change on resume"

Positive = Annotated[float, Range(low=0, open_low=True)]
NonNegative = Annotated[float, Range(low=0)]
# Small enough for the product of two to be a 64-bit number.
Count = Annotated[int, Range(low=1, high=2**31 - 1)]
Fraction = Annotated[float, Range(low=0, high=1)]


@dataclass(frozen=True, kw_only=True)
class BackboneRecipe:
    name: str = "dinov2"
    """The frozen encoder: mae, ijepa, clip, blip, mocov3, ibot, dino, dinov2, or the name of a timm ViT."""
    weights: str = "random"
    """Where its weights come from: `hf://repo/path`, `timm://name`, a local file, or `random`."""
    patch_size: Count | None = None
    """Patch size in pixels; null reads it from the weights (16 for `random`)."""
    embed_dim: Count | None = None
    """Width D of a token; null reads it from the weights (768 for `random`)."""
    depth: Count | None = None
    """Number of transformer blocks; null reads it from the weights (12 for `random`)."""
    num_heads: Count | None = None
    """Number of attention heads; null means embed_dim / 64."""


@dataclass(frozen=True, kw_only=True)
class EncoderRecipe:
    precision: Literal["auto", "fp8"] = "auto"
    """Format of the frozen blocks' matrix products: train.precision, or FP8 (Ada, Hopper and later)."""
    compile: Annotated[Literal["auto", "none", "default", "max-autotune"], MAY_CHANGE] = "auto"
    """torch.compile: not at all, usual, or with a search for the fastest kernels; `auto`: usual on GPUs."""
    cuda_graph: Annotated[bool, MAY_CHANGE] = False
    """Replay passes and optimiser (with several processes or fp16: the encoder alone) as CUDA graphs."""
    attention: Annotated[Literal["auto", "cudnn", "flash", "efficient", "math"], MAY_CHANGE] = "auto"
    """Kernel of the scaled-dot-product attention; `auto`: PyTorch's choice, on a CPU the faster one."""
    batch_views: Annotated[bool, MAY_CHANGE] = True
    """Three views in one batch, frame 1 cut into patches once; false takes three passes, less memory."""
    chunk: Annotated[int, Range(low=0), MAY_CHANGE] = 0
    """Pairs that go through the encoder at a time, which bounds its memory; 0: all on a GPU, 4 on a CPU."""
    cast_weights: Annotated[bool, MAY_CHANGE] = True
    """Cast the frozen weights to train.precision once; false keeps float32 and casts at every step."""


@dataclass(frozen=True, kw_only=True)
class ProjectionRecipe:
    head: Literal["linear", "mlp2", "mlp3"] = "linear"
    """The trained head: one, two or three linear layers, tanh between, LayerNorm at the end."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveRecipe:
    temperature: Positive = 0.03
    """Temperature of the affinities' softmax."""
    window: Count = 2
    """Side of the pooling window on the token grid before the affinities; 1 pools nothing."""
    lambda_reg: NonNegative = 3.0
    """Weight of the separability term."""
    regularizer: Literal["kl", "mse"] = "kl"
    """The separability term: KL over channels, or the mean squared difference of normalised tokens."""
    asymmetric_ratio: NonNegative = 10.0
    """How far the position embedding is enlarged before the crop that view 3 gets; 0 turns it off."""
    backend: Annotated[Literal["auto", "triton", "eager"], MAY_CHANGE] = "auto"
    """Who computes the losses: Triton kernels, eager PyTorch, or the faster one present."""


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    source: Annotated[str, MAY_CHANGE] = ""
    """Frame folders, a text file that lists them, a folder of video files, or a packed set."""
    kind: Annotated[Literal["auto", "folders", "list", "videos", "packed"], MAY_CHANGE] = "auto"
    """How to read the source; `auto` looks."""
    image_size: Annotated[int, Range(low=1, high=2**14)] = 224
    """Side of the square crop in pixels that the encoder sees."""
    gap: Fraction = 0.15
    """Distance of the two frames as a share of the video's length."""
    crop_area: tuple[Fraction, Fraction] = (0.5, 1.0)
    """Range of the crop's area as a share of the frame."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Range of the crop's aspect ratio, drawn log-uniformly."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip, the same for both frames."""
    pairs_per_video: Count = 1
    """Frame pairs that an epoch draws from each video."""
    decoder: Annotated[Literal["auto", "cpu", "mixed"], MAY_CHANGE] = "auto"
    """Where frames are decoded: host or GPU (`mixed`); `auto`: JPEG on the host, video on NVDEC if it can."""
    jpeg_engine_load: Annotated[Fraction, MAY_CHANGE] = 0.65
    """With `mixed`, the share of JPEG frames for the GPU's JPEG engine; its CUDA cores get the rest."""
    num_threads: Annotated[int, Range(low=0, high=2**12), MAY_CHANGE] = 0
    """Decoding threads of each process; 0 shares the machine's cores among its processes."""
    prefetch: Annotated[Count, MAY_CHANGE] = 2
    """Batches that are decoded ahead."""
    max_bad_fraction: Annotated[Fraction, MAY_CHANGE] = 0.01
    """Share of unreadable samples past which the run stops; fewer are replaced, counted and named."""


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    name: Literal["adamw", "apex_fused_adam", "apex_fused_lamb"] = "adamw"
    """torch's fused AdamW, or a fused optimiser of NVIDIA Apex where that is installed."""
    lr: Positive = 1e-4
    """Learning rate for a global batch of 256 pairs; it is scaled linearly with the global batch."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the running averages."""
    eps: Positive = 1e-8
    """Term that keeps the division stable."""
    weight_decay: NonNegative = 0.05
    """Decoupled weight decay, on matrices only."""


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    epochs: Positive = 5.0
    """Passes over the data; also the unit of the learning-rate schedule."""
    steps: Count | None = None
    """Optimiser steps; set, it replaces the number that follows from epochs, the schedule keeps its shape."""
    warmup_epochs: NonNegative = 1.0
    """Part of `epochs` in which the learning rate rises from 0; a cosine to 0 follows."""
    batch_size: Annotated[Count, MAY_CHANGE] = 128
    """Frame pairs per process and forward pass. Global batch = batch_size x accumulate x processes."""
    accumulate: Annotated[Count, MAY_CHANGE] = 1
    """Forward passes whose gradients make one optimiser step."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Number format of the encoder and of the head's matrix products; fp16 comes with loss scaling."""
    log_every: Annotated[Count, MAY_CHANGE] = 20
    """Steps between two lines of metrics; between them the host never waits for the device."""
    save_every: Annotated[Count, MAY_CHANGE] = 500
    """Steps between two checkpoints; the last step always writes one."""
    keep: Annotated[Count, MAY_CHANGE] = 2
    """Checkpoints that are kept."""
    tensorboard: Annotated[bool, MAY_CHANGE] = True
    """Write TensorBoard events beside metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class EvalRecipe:
    every: Annotated[int, Range(low=0), MAY_CHANGE] = 0
    """Steps between two validations (consistency and separability, before and after); 0 means never."""
    num_videos: Annotated[int, Range(low=2), MAY_CHANGE] = 16
    """Videos of the training source that a validation looks at."""
    num_frames: Annotated[int, Range(low=8), MAY_CHANGE] = 20
    """Frames of each of these videos."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run. `backbones` is empty for a single backbone; otherwise all of them train from one stream."""

    output: Annotated[str, MAY_CHANGE] = "runs/run"
    """Folder of the run; `~` is the home folder."""
    seed: Annotated[int, Range(low=-(2**63), high=2**63 - 1)] = 0
    """Seed of the head's weights, the sample order, the pairs, the crops and the position offsets."""
    resume: Annotated[Literal["auto", "never"], MAY_CHANGE] = "auto"
    """`auto` goes on from the last checkpoint in `output`; `never` refuses a folder that holds a run."""
    device: Annotated[Literal["auto", "cuda", "cpu"], MAY_CHANGE] = "auto"
    """Where to train; `auto` takes the GPU if there is one."""
    backbone: BackboneRecipe = field(default_factory=BackboneRecipe)
    """The one backbone of this run."""
    backbones: tuple[BackboneRecipe, ...] = ()
    """Several backbones, trained together from one stream of frames; each writes `output/NAME`."""
    encoder: EncoderRecipe = field(default_factory=EncoderRecipe)
    """How the frozen encoder is run."""
    projection: ProjectionRecipe = field(default_factory=ProjectionRecipe)
    """What is trained."""
    objective: ObjectiveRecipe = field(default_factory=ObjectiveRecipe)
    """What it is trained for."""
    data: DataRecipe = field(default_factory=DataRecipe)
    """What it is trained on."""
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    """What takes the steps."""
    train: TrainRecipe = field(default_factory=TrainRecipe)
    """How long, how fast, how precise."""
    eval: EvalRecipe = field(default_factory=EvalRecipe)
    """Validation during training."""


# --- reading -------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people mean it: `1e-4` is a float, and a key stands once."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        # What PyYAML raises for the 30th of February, or for a number of thousands of digits.
        except (AttributeError, KeyError, ValueError) as error:
            if not isinstance(node, yaml.ScalarNode):
                raise
            kind = node.tag.rsplit(":", 1)[-1]
            raise yaml.constructor.ConstructorError(
                problem=f"{node.value[:20]!r} is no {kind}", problem_mark=node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # What `<<` merges in may stand in the mapping as well, which then wins.
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(f"key {key!r} stands twice in one mapping{node.start_mark}; keep one")
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, apply `key=value` overrides in order, and check everything.

    Where the current folder has no `path`, such as recipes/dinov2.yaml, it is the project's own.

    Raises:
        InputError: the file is missing or no YAML mapping; a key is unknown, mistyped or out of range.
    """
    package = Path(__file__).parent
    # Where it lies in an installed package, and in a checkout.
    places = (Path(path), package / path, package.parent / path)
    tree = _read_tree(next((place for place in places if place.is_file()), places[0]), seen=())
    for override in overrides:
        _apply_override(tree, override)
    return recipe_from_dict(tree)


def recipe_from_dict(tree: Mapping[str, Any]) -> Recipe:
    """Build a checked recipe from nested mappings (what `to_dict` returns, or any part of it)."""
    recipe = _build(Recipe, tree, path="")
    _check_relations(recipe)
    return dataclasses.replace(recipe, output=os.path.expanduser(recipe.output))


def to_dict(recipe: Any) -> dict[str, Any]:
    """Every key with its value, as plain lists and mappings."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe: reading this text gives an equal recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def identity(recipe: Recipe) -> str:
    """Hash of all keys that decide what a run computes. Runs of equal identity may resume each other."""
    leaves = {
        path: value for path, value, hints in _walk(Recipe, to_dict(recipe), "") if MAY_CHANGE not in hints
    }
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The keys that matter to `identity` and differ, as `key: old -> new`."""
    new_leaves = {path: value for path, value, _ in _walk(Recipe, to_dict(new), "")}
    return [
        f"{path}: {value!r} -> {new_leaves[path]!r}"
        for path, value, hints in _walk(Recipe, to_dict(old), "")
        if MAY_CHANGE not in hints and value != new_leaves[path]
    ]


def describe_keys() -> list[tuple[str, str, str, str]]:
    """(dotted path, type, default, meaning) of every key, in the order of the dataclasses."""
    return list(_describe(Recipe, ""))


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader underneath
    except OSError as error:
        raise InputError(f"cannot read recipe {str(path)!r}: {error.strerror}; give a YAML file") from None
    except yaml.YAMLError as error:
        raise InputError(f"recipe {str(path)!r} is no valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError:
        raise InputError(f"recipe {str(path)!r} is no UTF-8 text; give a YAML file") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise InputError(f"recipe {str(path)!r} holds a {type(tree).__name__}; expected `key: value` lines")
    base = tree.pop("base", None)
    if base is None:
        return tree
    base_path = (path.parent / str(base)).resolve()
    if base_path in seen:
        raise InputError(f"recipe {str(path)!r} names {base!r} as its base, which leads back to itself")
    return _merge(_read_tree(base_path, (*seen, path.resolve())), tree)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"cannot read argument {override!r}; expected key=value, such as train.epochs=5")
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader underneath
    except yaml.YAMLError:
        value = text
    if not isinstance(value, dict | list) and key in _string_keys():
        # A path such as 2024 or `on` is a string whatever YAML makes of it.
        value = text
    *sections, leaf = key.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise InputError(f"{key}: {section!r} is not a section; {_nearest(key)}")
        tree = child
    if key == "backbones" and isinstance(value, list) and all(isinstance(name, str) for name in value):
        value = _pick_backbones(tree.get(key) or [], value)
    # A section given as a whole changes the keys it names, as a file changes those of its base.
    tree.update(_merge(tree, {leaf: value}))


def _pick_backbones(entries: list[Any], names: list[str]) -> list[Any]:
    """`backbones=[mae, dino]`: these of the recipe's own entries."""
    by_name = {entry.get("name"): entry for entry in entries if isinstance(entry, dict)}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        listed = ", ".join(map(str, by_name)) or "none"
        raise InputError(
            f"backbones: {unknown[0]!r} is not in the recipe's list ({listed}); name some of these, or give "
            f"whole entries: backbones=[{{name: mae, weights: PATH}}]"
        )
    return [by_name[name] for name in names]


# --- checking ------------------------------------------------------------------------------------------


def _build(cls: type[T], tree: Any, path: str) -> T:
    if not isinstance(tree, Mapping):
        raise InputError(f"{path}: expected a section of keys, got {tree!r}")
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in tree:
        if key not in hints:
            dotted = f"{path}.{key}" if path else str(key)
            raise InputError(f"unknown recipe key {dotted!r}; {_nearest(dotted)}")
    values = {
        key: _check(hints[key], value, f"{path}.{key}" if path else str(key)) for key, value in tree.items()
    }
    return cls(**values)


def _check(hint: Any, value: Any, path: str) -> Any:
    """`value` as `hint` wants it, or an InputError with the dotted path."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        checked = _check(arguments[0], value, path)
        for bound in arguments[1:]:
            if isinstance(bound, Range) and not bound.holds(checked):
                raise InputError(f"{path}: {checked!r} is impossible; expected a value {bound}")
        return checked
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _check(next(argument for argument in arguments if argument is not type(None)), value, path)
    if origin is Literal:
        # YAML reads a bare `on`, `off`, `no` as a boolean; no choice of ours is one.
        if value not in arguments:
            close = difflib.get_close_matches(str(value), arguments, n=1)
            hint_text = f" (did you mean {close[0]!r}?)" if close else ""
            raise InputError(
                f"{path}: {value!r} is no choice; expected one of {', '.join(arguments)}{hint_text}"
            )
        return value
    if origin is tuple:
        return _check_tuple(arguments, value, path)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path)
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{path}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")
    if hint is float and not math.isfinite(value):
        raise InputError(f"{path}: {value!r} is impossible; expected a finite number")
    return value


def _check_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{path}: expected a list, got {value!r} ({type(value).__name__})")
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise InputError(f"{path}: expected {len(arguments)} values, got {len(value)}: {value!r}")
    return tuple(
        _check(hint, item, f"{path}[{i}]")
        for i, (hint, item) in enumerate(zip(arguments, value, strict=True))
    )


def _check_relations(recipe: Recipe) -> None:
    """What no type can tell."""
    if not recipe.output:
        raise InputError("output: '' is no folder; name one with output=DIR")
    for path, (low, high) in (
        ("data.crop_area", recipe.data.crop_area),
        ("data.crop_ratio", recipe.data.crop_ratio),
    ):
        if low > high:
            raise InputError(f"{path}: [{low:g}, {high:g}] is impossible; expected the smaller number first")
    if recipe.data.crop_area[0] <= 0:
        raise InputError(f"data.crop_area[0]: {recipe.data.crop_area[0]!r} is impossible; expected above 0")
    for i, beta in enumerate(recipe.optimizer.betas):
        if beta >= 1:
            raise InputError(f"optimizer.betas[{i}]: {beta!r} is impossible; expected a value below 1")
    if recipe.train.warmup_epochs >= recipe.train.epochs:
        raise InputError(
            f"train.warmup_epochs: {recipe.train.warmup_epochs:g} is impossible with train.epochs="
            f"{recipe.train.epochs:g}; expected fewer warm-up epochs than epochs"
        )
    names = [backbone.name for backbone in recipe.backbones]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"backbones: {name!r} stands twice; each backbone writes a folder of its name")


def _walk(cls: type, tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """(dotted path, value, annotations) of every leaf of `tree`."""
    for key, hint in typing.get_type_hints(cls, include_extras=True).items():
        dotted = f"{path}.{key}" if path else key
        if dataclasses.is_dataclass(hint):
            yield from _walk(typing.cast(type, hint), tree[key], dotted)
        else:
            marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
            yield dotted, tree[key], marks


def _describe(cls: type, path: str) -> Iterator[tuple[str, str, str, str]]:
    meanings = _field_docs(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    for item in dataclasses.fields(cls):
        dotted = f"{path}.{item.name}" if path else item.name
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from _describe(typing.cast(type, hint), dotted)
        else:
            default = json.dumps(item.default if item.default != () else [])
            yield dotted, _type_name(hint), default, meanings[item.name]


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(
            "null" if argument is type(None) else _type_name(argument) for argument in arguments
        )
    if origin is Literal:
        return " / ".join(arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return "list of `backbone` sections"
        return f"list of {len(arguments)} {_type_name(arguments[0])}"
    return str(hint.__name__)


def _field_docs(cls: type) -> dict[str, str]:
    """The string beneath each field."""
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(cls)).body[0]).body
    return {
        typing.cast(ast.Name, item.target).id: str(typing.cast(ast.Constant, text.value).value)
        for item, text in itertools.pairwise(body)
        if isinstance(item, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _string_keys() -> set[str]:
    return {path for path, kind, _, _ in describe_keys() if kind == "str"}


def _nearest(dotted: str) -> str:
    known = [path for path, _, _, _ in describe_keys()]
    leaf = dotted.rsplit(".", 1)[-1]
    same_leaf = [path for path in known if path.rsplit(".", 1)[-1] == leaf]
    close = same_leaf or difflib.get_close_matches(dotted, known, n=1, cutoff=0)
    return f"did you mean {close[0]!r}?"
