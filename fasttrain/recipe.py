"""A recipe: strict YAML into frozen pydantic dataclasses. Every default is here, and only here.

`load_recipe(path, overrides)` reads a file (and the file it names under `base`), applies `key=value`
overrides, and checks every key, type and range. An error names the dotted path and the nearest known key.
The defaults are the paper's (Co-Settle, arXiv 2603.26597). The text beneath a field is its documentation;
the table in docs/recipes.md and the JSON schema for editors are made from it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, field, is_dataclass
from difflib import SequenceMatcher
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from fasttrain.errors import InputError

if TYPE_CHECKING:
    import torch

CONFIG = ConfigDict(
    extra="forbid", strict=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
)

# Marks a key that may change when a run is resumed: it does not alter what is computed, or the trainer
# compares its effect (`Trainer.facts`).
MAY_CHANGE = "may change on resume"

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
# Small enough for the product of two to be a 64-bit number.
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
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


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class EncoderRecipe:
    precision: Literal["auto", "fp8"] = "auto"
    """Format of the frozen blocks' matrix products: train.precision, or FP8 (Ada, Hopper and later)."""
    compile: Annotated[Literal["auto", "none", "default", "max-autotune"], MAY_CHANGE] = "auto"
    """torch.compile: not at all, usual, or with a search for the fastest kernels; `auto`: usual on GPUs."""
    cuda_graph: Annotated[bool, MAY_CHANGE] = False
    """Replay each pass as one CUDA graph; with several processes or fp16, the encoder only."""
    attention: Annotated[Literal["auto", "cudnn", "flash", "efficient", "math"], MAY_CHANGE] = "auto"
    """Kernel of the scaled-dot-product attention; `auto`: PyTorch's choice, on a CPU the faster one."""
    batch_views: Annotated[bool, MAY_CHANGE] = True
    """Three views in one batch, frame 1 cut into patches once; false takes three passes, less memory."""
    chunk: Annotated[int, Field(ge=0), MAY_CHANGE] = 0
    """Pairs that go through the encoder at a time, which bounds its memory; 0: all on a GPU, 4 on a CPU."""
    cast_weights: Annotated[bool, MAY_CHANGE] = True
    """Cast the frozen weights to train.precision once; false keeps float32 and casts at every step."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ProjectionRecipe:
    head: Literal["linear", "mlp2", "mlp3"] = "linear"
    """The trained head: one, two or three linear layers, tanh between, LayerNorm at the end."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
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
    """Frame 1's second view takes its positions from a map enlarged (1 + ratio) times; 0 turns it off."""
    backend: Annotated[Literal["auto", "triton", "eager"], MAY_CHANGE] = "auto"
    """Who computes the losses: Triton kernels, eager PyTorch, or the faster one present."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class DataRecipe:
    source: Annotated[str, MAY_CHANGE] = ""
    """Frame folders, a text file that lists them, a folder of video files, or a packed set."""
    kind: Annotated[Literal["auto", "folders", "list", "videos", "packed"], MAY_CHANGE] = "auto"
    """How to read the source; `auto` looks."""
    image_size: Annotated[int, Field(ge=1, le=2**14)] = 224
    """Side of the square crop in pixels that the encoder sees."""
    gap: Fraction = 0.15
    """Distance of the two frames as a share of the video's length."""
    crop_area: tuple[PositiveFraction, PositiveFraction] = (0.5, 1.0)
    """Range of the crop's area as a share of the frame."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Range of the crop's aspect ratio, drawn log-uniformly."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip, the same for both frames."""
    pairs_per_video: Count = 1
    """Frame pairs that an epoch draws from each video."""
    decoder: Annotated[Literal["auto", "cpu", "mixed"], MAY_CHANGE] = "auto"
    """Where training decodes: on the host (`cpu`; `auto` is the same) or the GPU (`mixed`: nvJPEG, NVDEC)."""
    jpeg_engine_load: Annotated[Fraction, MAY_CHANGE] = 0.65
    """With `mixed`, the share of JPEG frames for the GPU's JPEG engine; its CUDA cores get the rest."""
    num_threads: Annotated[int, Field(ge=0, le=2**12), MAY_CHANGE] = 0
    """Decoding threads of each process; 0 shares the machine's cores among its processes."""
    prefetch: Annotated[Count, MAY_CHANGE] = 2
    """Batches that are decoded ahead."""
    max_bad_fraction: Annotated[Fraction, MAY_CHANGE] = 0.01
    """Share of unreadable samples past which the run stops; fewer are replaced, counted and named."""

    @field_validator("crop_area", "crop_ratio")
    @classmethod
    def _is_a_range(cls, pair: tuple[float, float]) -> tuple[float, float]:
        if pair[0] > pair[1]:
            raise ValueError("expected the smaller number first")
        return pair


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class OptimizerRecipe:
    name: Literal["adamw", "apex_fused_adam", "apex_fused_lamb"] = "adamw"
    """torch's fused AdamW, or a fused optimiser of NVIDIA Apex where that is installed."""
    lr: Positive = 1e-4
    """Learning rate for a global batch of 256 pairs; it is scaled linearly with the global batch."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Decay of the running averages."""
    eps: Positive = 1e-8
    """Term that keeps the division stable."""
    weight_decay: NonNegative = 0.05
    """Decoupled weight decay, on matrices only."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TrainRecipe:
    epochs: Positive = 5.0
    """Passes over the data; also the unit of the learning-rate schedule."""
    steps: Count | None = None
    """Optimiser steps; null means as many as `epochs` takes. The schedule is stretched over them."""
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

    @property
    def dtype(self) -> torch.dtype:
        """`precision` as PyTorch names it."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    @field_validator("warmup_epochs")
    @classmethod
    def _leaves_epochs_to_train(cls, warmup_epochs: float, info: ValidationInfo) -> float:
        if warmup_epochs >= info.data.get("epochs", math.inf):
            raise ValueError(f"expected fewer than train.epochs={info.data['epochs']:g}")
        return warmup_epochs


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class EvalRecipe:
    every: Annotated[int, Field(ge=0), MAY_CHANGE] = 0
    """Steps between two validations (consistency and separability, before and after); 0 means never."""
    num_videos: Annotated[int, Field(ge=2), MAY_CHANGE] = 16
    """Videos of the training source that a validation looks at."""
    num_frames: Annotated[int, Field(ge=8), MAY_CHANGE] = 20
    """Frames of each of these videos."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Recipe:
    """One run. `backbones` is empty for a single backbone; otherwise all of them train from one stream."""

    output: Annotated[str, MAY_CHANGE] = "runs/run"
    """Folder of the run; `~` is the home folder."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] = 0
    """Seed of the head's weights, the sample order, the pairs, the crops and the position offsets."""
    resume: Annotated[Literal["auto", "never"], MAY_CHANGE] = "auto"
    """`auto` continues from the last checkpoint in `output`; `never` refuses a folder that holds a run."""
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

    @field_validator("output")
    @classmethod
    def _names_a_folder(cls, output: str) -> str:
        if not output:
            raise ValueError("expected a folder, such as output=runs/mine")
        return os.path.expanduser(output)

    @field_validator("backbones")
    @classmethod
    def _differ_in_name(cls, backbones: tuple[BackboneRecipe, ...]) -> tuple[BackboneRecipe, ...]:
        names = [backbone.name for backbone in backbones]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"each writes a folder of its name, and {name!r} is listed twice")
        return backbones


_RECIPE = TypeAdapter(Recipe)


# --- reading -------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people mean it: `1e-4` is a float, and duplicate keys raise."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"duplicate key {key!r} in one mapping; keep one", problem_mark=node.start_mark
                )
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
    candidates = (Path(path), package / path, package.parent / path)
    tree = _read_tree(next((file for file in candidates if file.is_file()), candidates[0]))
    for override in overrides:
        tree = _override(tree, override)
    return recipe_from_dict(tree)


def recipe_from_dict(tree: Mapping[str, Any]) -> Recipe:
    """Build a checked recipe from nested mappings (what `to_dict` returns, or any part of it)."""
    try:
        # Of JSON, pydantic's strict mode takes mappings as sections and lists as tuples. A date is a string.
        return _RECIPE.validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise InputError(_first_error(error)) from None


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Every key with its value, as plain lists and mappings."""
    return _RECIPE.dump_python(recipe, mode="json")


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe: reading this text gives an equal recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def recipe_hash(recipe: Recipe) -> str:
    """Hash of all keys that decide what a run computes. Runs of equal hash may resume each other."""
    decisive = json.dumps(_decisive(recipe), sort_keys=True, default=asdict)
    return hashlib.sha256(decisive.encode()).hexdigest()[:16]


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The keys that matter to `recipe_hash` and differ, as `key: old -> new`."""
    after = _decisive(new)
    return [
        f"{path}: {value!r} -> {after[path]!r}"
        for path, value in _decisive(old).items()
        if value != after[path]
    ]


def keys_table() -> str:
    """Every recipe key with type, default and meaning, as the Markdown table in docs/recipes.md."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for path, key in _keys(Recipe):
        schema = TypeAdapter(key.rebuild_annotation()).json_schema()
        kinds = schema.get("enum") or [kind["type"] for kind in schema.get("anyOf", [schema])]
        lines.append(f"| `{path}` | {' / '.join(kinds)} | `{json.dumps(key.default)}` | {key.description} |")
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """What a recipe's file may hold, as JSON schema, by which editors complete and check keys."""
    schema = _RECIPE.json_schema()
    base = {"type": "string", "description": "A recipe beside this file, whose keys this one changes."}
    return schema | {"properties": {"base": base} | schema["properties"]}


def _read_tree(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}  # a SafeLoader underneath
    except OSError as error:
        raise InputError(f"cannot read recipe {str(path)!r}: {error.strerror}; give a YAML file") from None
    # Text in another encoding, a 30th of February, a number of thousands of digits are ValueErrors.
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"recipe {str(path)!r} holds a {type(tree).__name__}; expected `key: value` lines")
    base = tree.pop("base", None)
    return tree if base is None else _merge(_read_tree(path.parent / str(base)), tree)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` with the keys of `above`, which win; sections are merged key by key."""
    merged = below | above
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            merged[key] = _merge(below[key], value)
    return merged


def _override(tree: dict[str, Any], argument: str) -> dict[str, Any]:
    """`tree` with the `key=value` of the command line. A section as value changes the keys it names."""
    key, equals, text = argument.partition("=")
    if not equals or not key:
        raise InputError(f"cannot read argument {argument!r}; expected key=value, such as train.epochs=5")
    value: Any = text
    # A path such as 2024 or `on` is a string whatever YAML makes of it.
    if not any(path == key and known.annotation is str for path, known in _keys(Recipe)):
        with suppress(yaml.YAMLError, ValueError):
            value = yaml.load(text, Loader=_Loader)  # a SafeLoader underneath
    if key == "backbones" and isinstance(value, list):
        # A name, as in `backbones=[mae, dino]`, picks the recipe's own entry.
        entries = {entry.get("name"): entry for entry in tree.get(key) or [] if isinstance(entry, dict)}
        for name in value:
            if isinstance(name, str) and name not in entries:
                listed = ", ".join(map(str, entries)) or "none"
                raise InputError(
                    f"backbones: {name!r} is not in the recipe's list ({listed}); name some of these, or "
                    f"give whole entries: backbones=[{{name: mae, weights: PATH}}]"
                )
        value = [entries[entry] if isinstance(entry, str) else entry for entry in value]
    for name in reversed(key.split(".")):
        value = {name: value}
    return _merge(tree, value)


def _first_error(error: ValidationError) -> str:
    """One line about the first error that pydantic found: its key, what was expected, what was given."""
    first = error.errors(include_url=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])[1:]
    if first["type"] == "unexpected_keyword_argument":
        # The nearest known key, first of all one of the same name in another section.
        name = path.rpartition(".")[2]
        nearest = max(
            (known for known, _ in _keys(Recipe)),
            key=lambda known: (known.endswith(f".{name}"), SequenceMatcher(None, path, known).ratio()),
        )
        return f"unknown recipe key {path!r}; did you mean {nearest!r}?"
    message = first["msg"].removeprefix("Value error, ")
    return f"{path}: {message[0].lower()}{message[1:]}, got {first['input']!r}"


def _keys(section: Any, path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its dotted path."""
    for name, key in section.__pydantic_fields__.items():
        if is_dataclass(key.annotation):
            yield from _keys(key.annotation, f"{path}{name}.")
        else:
            yield f"{path}{name}", key


def _decisive(recipe: Recipe) -> dict[str, Any]:
    """The values that decide what a run computes, by dotted path."""
    return {path: attrgetter(path)(recipe) for path, key in _keys(Recipe) if MAY_CHANGE not in key.metadata}
