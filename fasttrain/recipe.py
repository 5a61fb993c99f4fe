"""Recipes: the keys, defaults and checks of a run's configuration.

A recipe is a YAML file that is parsed strictly into frozen pydantic dataclasses. `load_recipe(recipe,
overrides)` reads the file and the recipe that it inherits from (`base`), applies the overrides, and
checks the name, type and range of every key. All defaults are defined here; they are the paper's (Co-Settle,
arXiv 2603.26597), except for `projection.init` and `eval.every`. The string below a field documents the key.
The table of keys in the documentation and the JSON schema (recipes/schema.json) are generated from these
strings.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, field, is_dataclass
from difflib import SequenceMatcher, get_close_matches
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

# Marks a key that may change when a run is resumed, because it does not affect the result or because the
# trainer checks its effect itself (`Trainer.facts`).
MAY_CHANGE = "may change on resume"

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
# Bounded, so that the product of two counts fits into 64 bits.
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class BackboneRecipe:
    name: str = "dinov2"
    """Frozen encoder: mae, ijepa, clip, blip, mocov3, ibot, dino, dinov2, or the name of a timm ViT."""
    weights: Annotated[str, MAY_CHANGE] = "random"
    """Pretrained weights: `hf://owner/repo[/path]`, `timm://name`, a local file or folder, or `random`."""
    patch_size: Count | None = None
    """Patch size in pixels; null: that of the weights (16 for `random`) or of the timm ViT."""
    embed_dim: Count | None = None
    """Embedding dimension of the tokens; null: that of the weights (768 for `random`) or of the timm ViT."""
    depth: Count | None = None
    """Number of transformer blocks; null: that of the weights (12 for `random`) or of the timm ViT."""
    num_heads: Count | None = None
    """Number of attention heads; null: that of the weights' configuration, the family or the timm ViT."""
    activation: Annotated[Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] | None, MAY_CHANGE] = None
    """Activation function of the MLPs; null: as for num_heads."""
    layer_norm_eps: Annotated[Positive | None, MAY_CHANGE] = None
    """Epsilon of the LayerNorms; null: that of the weights' configuration, the family or the timm ViT."""
    mean: Annotated[tuple[Fraction, Fraction, Fraction] | None, MAY_CHANGE] = None
    """Mean of RGB values (0 to 1); null: that of the weights' configuration, the timm ViT or ImageNet."""
    std: Annotated[tuple[PositiveFraction, PositiveFraction, PositiveFraction] | None, MAY_CHANGE] = None
    """Standard deviation of RGB values (0 to 1); null: as for mean."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class EncoderRecipe:
    precision: Literal["auto", "fp8"] = "auto"
    """Precision of the frozen linear layers; `auto`: train.precision; `fp8`: Ada, Hopper or later GPUs."""
    compile: Annotated[Literal["auto", "none", "default", "max-autotune"], MAY_CHANGE] = "auto"
    """Mode of torch.compile for the encoder; `auto`: `default` on a GPU, `none` on a CPU."""
    cuda_graph: Annotated[bool, MAY_CHANGE] = False
    """Replay forward and backward pass as a CUDA graph; with several processes or fp16, only the encoder."""
    attention: Annotated[Literal["auto", "cudnn", "flash", "efficient", "math"], MAY_CHANGE] = "auto"
    """Scaled dot-product attention kernel; `auto`: PyTorch's choice, or unfused on a CPU if faster."""
    batch_views: Annotated[bool, MAY_CHANGE] = True
    """Encode all views in one batch, which is faster; false: one pass per view, in less memory."""
    chunk: Annotated[int, Field(ge=0), MAY_CHANGE] = 0
    """Number of frame pairs to encode at a time, which limits memory; 0: all on a GPU, 4 on a CPU."""
    cast_weights: Annotated[bool, MAY_CHANGE] = True
    """Cast the frozen weights to train.precision once; false: keep float32 weights and use autocast."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ProjectionRecipe:
    head: Literal["linear", "mlp2", "mlp3", "lowrank", "residual"] = "linear"
    """The paper's heads of 1, 2 or 3 linear layers, or the tokens plus a low-rank map or a gated MLP."""
    init: Annotated[Literal["published", "frozen"], MAY_CHANGE] = "frozen"
    """Start at random as `published`, or at the `frozen` features (lowrank and residual: always)."""
    weights: str = "random"
    """Initial projection: run or file, `hf://owner/repo[/path]`, `cosettle://NAME`; `random`: see `init`."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ObjectiveRecipe:
    temperature: Positive = 0.03
    """Temperature of the affinity softmax."""
    window: Count = 2
    """Side of the average-pooling window on the token grid before the affinities; 1: no pooling."""
    lambda_reg: NonNegative = 3.0
    """Weight of the separability loss, or with adaptive `weighting` its start."""
    weighting: Literal["fixed", "constrained", "uncertainty", "gradnorm"] = "fixed"
    """Weights of the two losses: `fixed`: 1 and lambda_reg; the other methods adapt them at every step."""
    separability_limit: Annotated[float, Field(gt=0, le=2)] = 0.1
    """With `constrained`: largest mean cosine distance of the projected tokens from the frozen tokens."""
    regularizer: Literal["kl", "mse"] = "kl"
    """Separability loss: KL divergence over channels, or mean squared error of the normalised tokens."""
    asymmetric_ratio: NonNegative = 10.0
    """The last view's positions are cropped from a map enlarged by 1 + ratio; 0: the usual positions."""
    frames: Annotated[int, Field(ge=2, le=2**10)] = 2
    """Frames per sample, at the distance of data.gap; the walk visits all of them, there and back."""
    sub_cycles: bool = False
    """Average the cycle loss over the walks through the first 2, 3, ... frames."""
    curriculum: bool = False
    """Lengthen the walk during the run, from the first 2 frames to all of them."""
    backend: Annotated[Literal["auto", "triton", "eager"], MAY_CHANGE] = "auto"
    """Implementation of the losses; `auto`: Triton kernels on a GPU if Triton is installed, else eager."""

    @field_validator("weighting")
    @classmethod
    def _check_start(cls, weighting: str, earlier: ValidationInfo) -> str:
        if weighting != "fixed" and earlier.data.get("lambda_reg") == 0:
            raise ValueError("expected fixed for lambda_reg=0, from which no other weight can be reached")
        return weighting


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class DataRecipe:
    source: Annotated[str, MAY_CHANGE] = ""
    """Training videos: a folder of videos or frame folders, a list of them, or a packed set (path or URL)."""
    kind: Annotated[Literal["auto", "folders", "list", "videos", "packed"], MAY_CHANGE] = "auto"
    """Type of the source; `auto`: detect it."""
    image_size: Annotated[int, Field(ge=1, le=2**14)] = 224
    """Side of the square training crop in pixels."""
    gap: Fraction = 0.15
    """Distance between a frame and the next one, as a fraction of the video's length."""
    crop_area: tuple[PositiveFraction, PositiveFraction] = (0.5, 1.0)
    """Range of the crop's area, as a fraction of the frame."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Range of the crop's aspect ratio, sampled log-uniformly."""
    flip: Fraction = 0.5
    """Probability of flipping the frames of a sample horizontally."""
    pairs_per_video: Count = 1
    """Frame pairs drawn from each video per epoch."""
    decoder: Annotated[Literal["auto", "cpu", "mixed"], MAY_CHANGE] = "auto"
    """Decode on the CPU (`cpu`, and `auto` in training) or on the GPU with nvJPEG and NVDEC (`mixed`)."""
    jpeg_engine_load: Annotated[Fraction, MAY_CHANGE] = 0.65
    """With `mixed`, fraction of JPEG frames decoded by the GPU's JPEG engine; CPU and GPU share the rest."""
    num_threads: Annotated[int, Field(ge=0, le=2**12), MAY_CHANGE] = 0
    """Decoding threads per process; 0: one per CPU core of the process, less two if it uses a GPU."""
    prefetch: Annotated[Count, MAY_CHANGE] = 2
    """Number of batches to decode ahead."""
    cache_size: Annotated[NonNegative, MAY_CHANGE] = 32.0
    """Size in GiB of the local cache of frames from a URL, for all such sources together; 0: no cache."""
    max_bad_fraction: Annotated[Fraction, MAY_CHANGE] = 0.01
    """Stop if more than this fraction of samples is unreadable; fewer are replaced, counted and logged."""

    @field_validator("crop_area", "crop_ratio")
    @classmethod
    def _check_range(cls, pair: tuple[float, float]) -> tuple[float, float]:
        if pair[0] > pair[1]:
            raise ValueError("expected the smaller number first")
        return pair


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class OptimizerRecipe:
    name: Literal["adamw", "apex_fused_adam", "apex_fused_lamb"] = "adamw"
    """PyTorch's fused AdamW, or a fused optimiser of NVIDIA Apex, which must be installed."""
    lr: Positive = 1e-4
    """Peak learning rate for a global batch of 256 frame pairs, scaled linearly with the global batch."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Decay rates of the running averages of the gradient and its square."""
    eps: Positive = 1e-8
    """Term added to the denominator for numerical stability."""
    weight_decay: NonNegative = 0.05
    """Decoupled weight decay, applied to matrices only."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TrainRecipe:
    epochs: Annotated[Positive, MAY_CHANGE] = 5.0
    """Number of epochs, which may be fractional. A greater number extends a run."""
    steps: Annotated[Count | None, MAY_CHANGE] = None
    """Number of optimiser steps; null: derived from `epochs`. The schedule always spans all steps."""
    warmup_epochs: NonNegative = 1.0
    """Epochs of linear learning-rate warm-up from 0; a cosine decay to 0 follows."""
    batch_size: Annotated[Count, MAY_CHANGE] = 128
    """Frame pairs per process and forward pass. Global batch = batch_size x accumulate x processes."""
    accumulate: Annotated[Count, MAY_CHANGE] = 1
    """Forward passes whose gradients are accumulated for one optimiser step."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of the encoder and of the projection's matrix products; fp16 uses loss scaling."""
    log_every: Annotated[Count, MAY_CHANGE] = 20
    """Steps between log lines; the host waits for the device only to log, save or validate."""
    save_every: Annotated[Count, MAY_CHANGE] = 500
    """Steps between checkpoints; the last step always writes one."""
    keep: Annotated[Count, MAY_CHANGE] = 2
    """Number of checkpoints to keep."""
    stall_timeout: Annotated[Positive, MAY_CHANGE] = 1800.0
    """Seconds without progress after which a run of several processes ends and names the one that hangs."""
    tensorboard: Annotated[bool, MAY_CHANGE] = True
    """Write TensorBoard events in addition to metrics.jsonl."""
    tracker: Annotated[Literal["none", "trackio", "wandb"], MAY_CHANGE] = "none"
    """Experiment tracker that gets the recipe, the metrics and the pictures as well."""

    @property
    def dtype(self) -> torch.dtype:
        """`precision` as a torch.dtype."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class EvalRecipe:
    every: Annotated[int, Field(ge=0), MAY_CHANGE] = 500
    """Steps between validations, without labels; the best projection is kept. 0: keep the last one."""
    held_out: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Number of videos that are validated and not trained on; 0: validate num_videos training videos."""
    num_videos: Annotated[int, Field(ge=2), MAY_CHANGE] = 16
    """Number of training videos used for validation, if none are held out."""
    num_frames: Annotated[int, Field(ge=8), MAY_CHANGE] = 20
    """Number of frames per validation video."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Recipe:
    """The configuration of one run; `load_recipe` reads it from a file.

    A run trains one projection for `backbone`, or one for each of `backbones` if there are any.
    """

    output: Annotated[str, MAY_CHANGE] = "runs/run"
    """Run folder; `~` expands to the home folder."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] = 0
    """Seed of the initial weights, sample order, frame pairs, crops and position offsets."""
    resume: Annotated[Literal["auto", "never"], MAY_CHANGE] = "auto"
    """`auto`: continue from the last checkpoint in `output`; `never`: refuse a folder that holds a run."""
    device: Annotated[Literal["auto", "cuda", "cpu"], MAY_CHANGE] = "auto"
    """Device to train on; `auto`: a GPU if available, else the CPU."""
    backbone: BackboneRecipe = field(default_factory=BackboneRecipe)
    """The frozen encoder."""
    backbones: tuple[BackboneRecipe, ...] = ()
    """Several backbones, trained together on the same frames; each writes to `output/NAME`."""
    encoder: EncoderRecipe = field(default_factory=EncoderRecipe)
    """Execution of the frozen encoder."""
    projection: ProjectionRecipe = field(default_factory=ProjectionRecipe)
    """The trained projection."""
    objective: ObjectiveRecipe = field(default_factory=ObjectiveRecipe)
    """The training objective."""
    data: DataRecipe = field(default_factory=DataRecipe)
    """The training data and its augmentation."""
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    """The optimiser."""
    train: TrainRecipe = field(default_factory=TrainRecipe)
    """Length, batch size, precision and logging."""
    eval: EvalRecipe = field(default_factory=EvalRecipe)
    """Validation during training."""

    @field_validator("output")
    @classmethod
    def _check_output(cls, output: str) -> str:
        if not output:
            raise ValueError("expected a folder, such as output=runs/dinov2")
        return os.path.expanduser(output)

    @field_validator("backbones")
    @classmethod
    def _check_names(cls, backbones: tuple[BackboneRecipe, ...]) -> tuple[BackboneRecipe, ...]:
        if len({backbone.name for backbone in backbones}) < len(backbones):
            raise ValueError("expected distinct names, because each backbone writes to output/NAME")
        return backbones


_RECIPE = TypeAdapter(Recipe)
# Inside the package in an installation, and next to it in a source checkout.
_PACKAGE = Path(__file__).parent
RECIPES = next(path for path in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if path.is_dir())
# More than any recipe needs; see `_parse`.
MAX_VALUES, MAX_DEPTH = 10_000, 20
SUFFIXES = (".yaml", ".yml")


# --- reading -------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads `1e-4` as a float and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"duplicate key {key!r}; remove one", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_recipe(recipe: str | Path | Recipe, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe, apply overrides, and check all keys.

    Args:
        recipe: The name of a recipe that ships with fasttrain, such as `dinov2`; the path of a YAML file;
            or a `Recipe`. `recipes/dinov2.yaml` means the shipped recipe unless such a file exists.
        overrides: Assignments such as `"train.epochs=3"`, whose values are parsed as YAML, or a mapping
            of keys and sections to values, such as `{"train.epochs": 3, "data": {"source": "videos"}}`.
            They are applied in order.

    Returns:
        The recipe, with the default of every key that neither the file nor its `base` nor an override sets.

    Raises:
        InputError: The file does not exist or is not a YAML mapping, or a key is unknown, has the wrong type
            or is out of range.
    """
    if isinstance(recipe, Recipe):
        tree = to_dict(recipe)
    elif "\0" in str(recipe):
        raise InputError(f"recipe {str(recipe)!r}: a path cannot contain a null character; pass a YAML file")
    else:
        tree = _read_tree(_find(recipe))
    values = overrides.items() if isinstance(overrides, Mapping) else map(_assignment, overrides)
    changes: dict[str, Any] = {}
    for key, value in values:
        tree = _override(tree, key, value)
        if key != "backbones":
            changes = _override(changes, key, value)
    _check_effect(changes, tree, harmless={})
    return recipe_from_dict(tree)


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that ship with fasttrain."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def is_name(recipe: str | Path) -> bool:
    """Return whether this is the name of a recipe rather than a path: one word without a suffix."""
    return Path(recipe).name == str(recipe) and not Path(recipe).suffix


def _find(recipe: str | Path, folder: Path = Path()) -> Path:
    """Return the file of a recipe: that of `folder`, or else the one that ships with fasttrain."""
    shipped = RECIPES / f"{recipe}.yaml"
    if is_name(recipe) and shipped.is_file():
        return shipped
    candidates = (folder / recipe, RECIPES.parent / recipe, RECIPES / recipe)
    found = next((path for path in candidates if path.is_file()), candidates[0])
    if is_name(recipe) and not found.is_file():
        raise InputError(f"recipe {str(recipe)!r} does not exist{unknown_name(str(recipe))}")
    return found


def unknown_name(name: str, others: Iterable[str] = ()) -> str:
    """Return the end of a message about an unknown name: the nearest one, and the recipes there are."""
    names = shipped_recipes()
    own = [f"{name}{suffix}" for suffix in SUFFIXES if Path(f"{name}{suffix}").is_file()]
    nearest = own or get_close_matches(name, [*names, *others], n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return f"{hint} Recipes are YAML files, or one of {', '.join(names)}"


def recipe_from_dict(tree: Mapping[str, Any]) -> Recipe:
    """Check nested mappings, complete or partial, and build a recipe from them; the inverse of `to_dict`."""
    try:
        # In strict mode, pydantic accepts mappings as dataclasses and lists as tuples in JSON input only.
        # `default=str` turns dates, which YAML parses, back into strings.
        return _RECIPE.validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise InputError(_first_error(error)) from None


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return all keys and values as nested dictionaries and lists."""
    return _RECIPE.dump_python(recipe, mode="json")


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML text, from which an equal recipe can be read."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def recipe_hash(recipe: Recipe) -> str:
    """Hash the keys that determine the result of a run. A run is resumed only if its hash is unchanged."""
    decisive = json.dumps(_decisive(recipe), sort_keys=True, default=asdict)
    return hashlib.sha256(decisive.encode()).hexdigest()[:16]


def differences(old: Recipe, new: Recipe) -> list[str]:
    """List the keys of `recipe_hash` that differ, as `key: old -> new`."""
    after = _decisive(new)
    return [
        f"{path}: {value!r} -> {after[path]!r}"
        for path, value in _decisive(old).items()
        if value != after[path]
    ]


def keys_table() -> str:
    """Return all recipe keys with their types, defaults and meanings as a Markdown table."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for path, key in _keys(Recipe):
        schema = TypeAdapter(key.rebuild_annotation()).json_schema()
        kinds = schema.get("enum") or [kind["type"] for kind in schema.get("anyOf", [schema])]
        lines.append(f"| `{path}` | {' / '.join(kinds)} | `{json.dumps(key.default)}` | {key.description} |")
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipe files, which editors use to complete and check keys."""
    schema = _RECIPE.json_schema()
    description = (
        "Recipe to inherit from: a path relative to this file, or the name of one that ships with fasttrain."
    )
    base = {"type": "string", "description": description}
    return schema | {"properties": {"base": base} | schema["properties"]}


def _read_tree(path: Path, heirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe and, recursively, its `base`. `heirs` are the recipes that inherit from this one."""
    if path.resolve() in heirs:
        raise InputError(f"base: recipe {str(path)!r} inherits from itself; remove or correct its `base`")
    try:
        tree = _parse(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        others = [path.with_suffix(suffix) for suffix in SUFFIXES if isinstance(error, FileNotFoundError)]
        found = next((str(other) for other in others if other.is_file()), None)
        advice = f"did you mean {found!r}?" if found else "pass a YAML file"
        raise InputError(
            f"recipe {str(path)!r} cannot be read: {str(error.strerror).lower()}; {advice}"
        ) from None
    # Also raised for text in another encoding.
    except ValueError as error:
        raise InputError(f"recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"recipe {str(path)!r}: expected `key: value` lines, got a {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        _check_effect(tree, tree, harmless=asdict(BackboneRecipe()))
        return tree
    if not isinstance(base, str) or "\0" in base:
        raise InputError(f"base: {_shown(base)} in {str(path)!r} is not a path; expected that of a recipe")
    merged = _merge(_read_tree(_find(base, path.parent), (*heirs, path.resolve())), tree)
    _check_effect(tree, merged, harmless=asdict(BackboneRecipe()))
    return merged


def _check_effect(changes: Mapping[str, Any], tree: dict[str, Any], harmless: Mapping[str, Any]) -> None:
    """Raise InputError if the changes set a key of `backbone` in a recipe that lists `backbones`.

    Two cases are allowed: an inherited section `backbone`, which `backbones` replaces, and keys with the
    values in `harmless`, because a resolved recipe contains all defaults.
    """
    section = changes.get("backbone")
    keys = section.items() if isinstance(section, dict) else ()
    if tree.get("backbones") and any(harmless.get(key) != value for key, value in keys):
        raise InputError(
            "backbone: this section has no effect in a recipe with backbones; set its keys in the entries of "
            "backbones, or set backbones=[] to train one backbone"
        )


def _parse(text: str) -> Any:
    """Parse YAML. Raises ValueError for invalid YAML, and for values that no recipe needs."""
    try:
        value = yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # PyYAML raises ValueError for impossible dates and integers of thousands of digits, and AttributeError or
    # TypeError if the tag of a value (`!!timestamp x`) does not fit it.
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise ValueError(str(error)) from None
    # Anchors make short text stand for billions of values, or for a value that contains itself.
    todo, count = [(value, 0)], 0
    while todo:
        node, depth = todo.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise ValueError(f"expected at most {MAX_VALUES} values, nested at most {MAX_DEPTH} levels deep")
        inner = (
            node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple | set) else ()
        )
        todo += [(each, depth + 1) for each in inner]
    return value


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `changes`, recursively for sections."""
    merged = base | changes
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = _merge(base[key], value)
    return merged


def _assignment(argument: str) -> tuple[str, Any]:
    """Split `key=value`, and parse the value as YAML."""
    key, equals, text = argument.partition("=")
    if not equals or not key:
        raise InputError(f"argument {argument!r}: expected key=value, such as train.epochs=5")
    # String keys keep the text, even if YAML would read it as a number or a boolean (2024, on).
    if not any(path == key and info.annotation is str for path, info in _keys(Recipe)):
        with suppress(ValueError):
            return key, _parse(text)
    return key, text


def _override(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return `tree` with a value assigned to a dotted key. A section as the value is merged key by key."""
    if key == "backbones" and isinstance(value, list | tuple):
        # A name, as in `backbones=[mae, dino]`, selects an entry of the recipe.
        entries = {entry.get("name"): entry for entry in tree.get(key) or [] if isinstance(entry, dict)}
        for name in value:
            if isinstance(name, str) and name not in entries:
                if not entries:
                    problem = "names no entry, because the recipe does not list any backbones"
                else:
                    problem = f"is not one of the recipe's backbones: {', '.join(map(str, entries))}"
                raise InputError(
                    f"backbones: {name!r} {problem}. To add one, pass a complete entry: "
                    f"backbones=[{{name: mae, weights: PATH}}]"
                )
        value = [entries[entry] if isinstance(entry, str) else entry for entry in value]
    for name in reversed(key.split(".")):
        value = {name: value}
    return _merge(tree, value)


# Replacements for the wording of pydantic's messages.
_WORDING = (
    (r"^Input should be an object$", "expected a section of keys"),
    (r"^Input should be (greater|less)", r"expected a value \1"),
    (r"^Input should be", "expected"),
    (r"^Field required$", "expected a value"),
    (r"^Tuple should have at most (\d+) items.*", r"expected \1 values"),
    (r"a valid array$", "a list"),
)


def check_key(key: str) -> None:
    """Raise InputError if a recipe has neither a key nor a section of this dotted path."""
    if not any(f"{path}.".startswith(f"{key}.") for path, _ in _keys(Recipe)):
        raise InputError(_unknown_key(key))


def _unknown_key(path: str) -> str:
    """Suggest a key of the same name in another section or else the most similar key."""
    name = path.rpartition(".")[2].replace("-", "_")
    nearest = max(
        (key for key, _ in _keys(Recipe)),
        key=lambda key: (key.endswith(f".{name}"), SequenceMatcher(None, path[:100], key).ratio()),
    )
    hint = "`fasttrain train --keys` lists all keys"
    return f"unknown recipe key {_shown(path)}; did you mean {nearest!r}? {hint}"


def _first_error(error: ValidationError) -> str:
    """Describe the first error that pydantic reports in one line: the key, the expectation and the value."""
    first = error.errors(include_url=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])[1:]
    if first["type"] == "unexpected_keyword_argument":
        return _unknown_key(path)
    if first["type"] == "literal_error":
        choices = first["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        return f"{path}: {_shown(first['input'])} is not one of: {choices}"
    message = first["msg"].removeprefix("Value error, ")
    for pydantics, ours in _WORDING:
        message = re.sub(pydantics, ours, message)
    return f"{path}: {message}, got {_shown(first['input'])}"


def _shown(value: Any) -> str:
    """Return the representation of a value for a message, cut off if it is long."""
    text = "an empty value" if value is None else repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _keys(section: Any, path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted path and the field of every key."""
    for name, key in section.__pydantic_fields__.items():
        if is_dataclass(key.annotation):
            yield from _keys(key.annotation, f"{path}{name}.")
        else:
            yield f"{path}{name}", key


def _decisive(recipe: Recipe) -> dict[str, Any]:
    """Return the values of the keys that determine the result of a run, by dotted path."""
    return {path: attrgetter(path)(recipe) for path, key in _keys(Recipe) if MAY_CHANGE not in key.metadata}
