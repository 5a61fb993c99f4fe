"""Publish a run on the Hugging Face Hub, in one commit.

The repository gets the projection, the recipe, the results of `fasttrain eval` with a picture of each, and a
model card. It does not get the weights of the backbone, which stay where they are. Anyone can then call
`load_video_encoder("hf://USER/NAME")`.

Of paths on this machine and of URLs of data, only the last part is published. To log in, run
`hf auth login` or set HF_TOKEN.
"""

import argparse
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import timm
import yaml
from huggingface_hub.errors import HFValidationError

import fasttrain
from fasttrain.errors import DISTRIBUTION, InputError
from fasttrain.evaluation import results
from fasttrain.evaluation.results import Result
from fasttrain.files import is_url, parse_json
from fasttrain.loggers import say
from fasttrain.options import TASKS
from fasttrain.projection import PROJECTION_FILE, Projection
from fasttrain.video_encoder import load_video_encoder, trained_backbone
from fasttrain.weights import hash_state_dict, is_local

# The keys of a recipe that the card shows.
KEYS = (
    *("backbone.name", "backbone.weights", "data.source", "data.image_size", "data.gap", "projection.head"),
    *("objective.temperature", "objective.window", "objective.lambda_reg", "optimizer.lr", "train.epochs"),
    *("train.steps", "train.batch_size", "train.accumulate", "train.precision", "seed"),
)
# The sections of these that do not matter for a projection of `fasttrain fit`.
TRAINED_ONLY = ("objective.", "optimizer.", "train.")
# The settings that name a place.
PLACES = ("source", "output", "weights", "projection", "run", "root", "videos", "list")
PUBLIC = ("hf://", "timm://", "cosettle://")


def run(arguments: argparse.Namespace) -> None:
    push(arguments.run, arguments.repository, private=arguments.private, weights=arguments.weights)


def push(run: Path, repository: str, *, private: bool = False, weights: str | None = None) -> str:
    """Publish a run on the Hugging Face Hub, in one commit, and print what is uploaded.

    Args:
        run: The run folder.
        repository: The repository, `user/name`, which is created if it does not exist. Results and pictures
            of an earlier upload are deleted from it.
        private: Whether a new repository is private.
        weights: A public location of the backbone's weights (`hf://` or `timm://`), if the run was trained on
            a copy of them. Their hash must be the same as in training.

    Returns:
        The address of the repository.

    Raises:
        InputError: The run cannot be read, the weights are others, or the Hub refuses or cannot be reached.
    """
    if repository.count("/") != 1:
        name = repository.rpartition("/")[2] or "dinov2-video"
        raise InputError(f"repository {repository!r}: expected USER/NAME, such as me/{name}")
    try:
        huggingface_hub.utils.validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"repository {repository!r}: {error}") from error
    if huggingface_hub.get_token() is None:
        raise InputError("not logged in to the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN")
    with TemporaryDirectory() as folder:
        projection = write_repository(run, Path(folder), repository, weights=weights)
        hub = huggingface_hub.HfApi(library_name="fasttrain", library_version=fasttrain.__version__)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        say(f"uploading {len(files)} files to {repository}")
        for file in files:
            say(f"  {file.relative_to(folder)} ({file.stat().st_size / 1e3:.1f} kB)")
        try:
            address = hub.create_repo(repository, private=private or None, exist_ok=True)
            hub.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=f"Upload a projection trained with fasttrain {fasttrain.__version__}",
                delete_patterns=["eval/*", "figures/*"],
            )
        # The type of network errors depends on the HTTP library that huggingface_hub uses.
        except Exception as error:
            raise InputError(f"repository {repository!r}: {_problem(error)}") from error
    load, note = _loading(repository, projection)
    say(f"published at {address}")
    say(f"load it with {load}")
    say(note)
    return str(address)


def _problem(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the Hub does not accept the token; run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return "the token may not write there; pass a repository of your own, and a token that may write"
    # The address of a mirror (HF_ENDPOINT) may contain a password.
    reason = re.sub(r"(?<=://)[^/\s]*@", "", (str(error).splitlines() or [""])[0])
    return f"the upload failed ({type(error).__name__}: {reason}). Check the network, and repeat the command"


def write_repository(run: Path, folder: Path, repository: str, *, weights: str | None = None) -> Projection:
    """Write the files that `push` uploads to a folder, from which `load_video_encoder` loads, too.

    Args:
        run: The run folder.
        folder: An empty folder.
        repository: The name of the repository, for the card.
        weights: As for `push`.

    Returns:
        The projection with the published metadata.

    Raises:
        InputError: The run cannot be read, or the weights are others.
    """
    if weights is not None:
        if not weights.startswith(("hf://", "timm://")):
            raise InputError(
                f"--weights {weights!r}: expected a public location, hf://owner/repo or timm://name"
            )
        # Their hash is checked.
        projection = load_video_encoder(run, weights=weights).projection
    else:
        projection = Projection.find(str(run))
    if "recipe" not in projection.metadata:
        raise InputError(
            f"run '{run}': its {PROJECTION_FILE} is not from a training run; push the run folder"
        )
    settings = trained_backbone(projection)
    settings["weights"] = published(weights or settings.get("weights", "random"), "weights")
    recipe = published(parse_json(projection.metadata["recipe"]))
    recipe["backbone"] = {**recipe.get("backbone", {}), "weights": settings["weights"]}
    projection.metadata |= {
        "backbone": json.dumps(settings),
        "weights": settings["weights"],
        "recipe": json.dumps(recipe),
    }
    projection.save(folder / PROJECTION_FILE, projection.metadata)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), "utf-8")
    evaluated = _copy_results(run, folder, projection)
    card = _card(repository, projection, settings, recipe, evaluated, _copy_pictures(run, folder, evaluated))
    (folder / "README.md").write_text(card, "utf-8")
    return projection


def published(value: Any, key: str = "") -> Any:
    """Replace paths of this machine and URLs in JSON by their last part, without host and password."""
    if isinstance(value, dict):
        return {published(name): published(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [published(inner, key) for inner in value]
    if not isinstance(value, str) or value.startswith(PUBLIC):
        return value
    if is_url(value):
        url = urlsplit(value)
        return os.path.basename(url.path.rstrip("/")) or url.scheme
    is_place = key in PLACES or key.endswith("_list") or os.path.isabs(value)
    return os.path.basename(os.path.abspath(value)) if value and is_place else value


def _copy_results(run: Path, folder: Path, projection: Projection) -> list[tuple[Path, Result]]:
    """Copy those results that belong to the projection; return their original files and contents."""
    own = hash_state_dict(projection.state_dict())
    evaluated = []
    for path in results.find_results(run / "eval"):
        result = results.read_result(path)
        if result.model.projection_hash != own or result.task not in TASKS:
            say(f"not uploaded: {path}, because it is not a result of this projection")
            continue
        content = parse_json(path.read_bytes())
        # Reasons why single videos were skipped, which may contain their paths.
        content.get("data", {}).pop("skipped", None)
        target = folder / "eval" / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(published(content), indent=2), "utf-8")
        evaluated.append((path, result))
    # In the order of the documentation.
    tasks = list(TASKS)
    return sorted(evaluated, key=lambda one: (tasks.index(one[1].task), one[1].date))


def _copy_pictures(run: Path, folder: Path, evaluated: list[tuple[Path, Result]]) -> list[str]:
    """Copy the first picture of each result and the learning curves; return their names."""
    originals = [
        path.with_suffix("") / "figures" / picture
        for path, result in evaluated
        for picture in [name for name in result.pictures if name.endswith(".png")][:1]
    ]
    names = []
    for original in [*originals, run / "figures" / "learning.png"]:
        if original.is_file():
            prefix = "" if original.parent.parent == run else f"{original.parent.parent.name}-"
            names.append(f"{prefix}{original.name}")
            (folder / "figures").mkdir(exist_ok=True)
            shutil.copyfile(original, folder / "figures" / names[-1])
    return names


# --- the model card ------------------------------------------------------------------------------------


def _card(
    repository: str,
    projection: Projection,
    settings: dict[str, Any],
    recipe: dict[str, Any],
    evaluated: list[tuple[Path, Result]],
    pictures: list[str],
) -> str:
    load, weights = _loading(repository, projection)
    data = huggingface_hub.ModelCardData(
        library_name="fasttrain",
        pipeline_tag="image-feature-extraction",
        tags=["video", "feature-extraction", "co-settle", settings["name"]],
        **_base_model(settings["weights"]),
    )
    template = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))
    text = template.substitute(
        name=repository.partition("/")[2],
        backbone=settings["name"],
        version=fasttrain.__version__,
        distribution=DISTRIBUTION,
        weights=weights,
        load=load,
        dim=projection.dim,
        training=_table(("key", "value"), _shown_keys(recipe, projection.metadata)),
        results=_results_table(evaluated),
        pictures="\n\n".join(f"![{Path(name).stem}](figures/{name})" for name in pictures),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _loading(repository: str, projection: Projection) -> tuple[str, str]:
    """Return the call that loads the encoder, and a sentence on the weights of its backbone."""
    weights = projection.metadata["weights"]
    if weights == "random":
        note = (
            "The encoder has random weights. The same versions of torch and timm rebuild them from the seed."
        )
    elif is_local(weights):
        note = (
            f"The weights of the encoder are not part of this repository: pass the path of a copy of "
            f"`{weights}` as `weights`. The SHA-256 hash of its parameters must be "
            f"`{projection.metadata['weights_hash']}`."
        )
    else:
        note = f"The weights of the encoder are downloaded from `{weights}`."
    argument = ', weights="PATH"' if is_local(weights) else ""
    return f'load_video_encoder("hf://{repository}"{argument})', note


def _base_model(location: str) -> dict[str, Any]:
    """Return the repository of the weights on the Hub as metadata of the card, if they have one."""
    name = None
    if location.startswith("hf://"):
        name = re.split("[@#]", "/".join(location.removeprefix("hf://").split("/")[:2]))[0]
    elif location.startswith("timm://"):
        found = timm.get_pretrained_cfg(location.removeprefix("timm://").partition("#")[0])
        name = found and found.hf_hub_id
    return {"base_model": name, "base_model_relation": "adapter"} if name else {}


def _shown_keys(recipe: dict[str, Any], metadata: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Yield keys and values; only the metadata of the closed form has a strength."""
    is_fit = "strength" in metadata
    if is_fit:
        parameters = f"strength {metadata['strength']}, whitening {metadata['whitening']}"
        yield "closed form (`fasttrain fit`)", parameters
    for key in KEYS:
        if is_fit and key.startswith(TRAINED_ONLY):
            continue
        value: Any = recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        # The number of steps, if it is given, counts instead of the epochs.
        if value is not None and (key != "train.epochs" or recipe["train"].get("steps") is None):
            yield f"`{key}`", f"`{value}`"


def _results_table(evaluated: list[tuple[Path, Result]]) -> str:
    if not evaluated:
        return "Not evaluated."
    rows = []
    for _, group in groupby(evaluated, lambda one: one[1].task):
        members = [result for _, result in group]
        protocols = [published(result.protocol) for result in members]
        data = [protocol.pop("root", "") for protocol in protocols]
        for result, name, difference in zip(members, data, results.distinguish(protocols), strict=True):
            for metric in result.headlines:
                values = result.values(metric)
                shown = [results.format_value(values.get(variant), metric) for variant in ("before", "after")]
                task = f"{result.task} ({difference})" if difference else result.task
                rows.append((task, name, metric, *shown, results.better(metric), results.meaning(metric)))
    header = ("benchmark", "data", "metric", "before", "after", "better", "meaning")
    return f"Before: the frozen encoder alone. After: with the projection.\n\n{_table(header, rows)}"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '') for cell in line)} |" for line in lines)
