"""Whole conversions: a run's checkpoint to a foreign format, a foreign file to a checkpoint.

    export_checkpoint("runs/quickstart/pretrain", format="hugging_face", output="exported")
    import_checkpoint("beit_base_patch16_224_pt22k.pth", output="imported")

Either way the report says what became of every name, and a name that is missing or left over is an
error unless it was allowed.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from absl import logging
from etils import epath

from beit_jax.config import one_of
from beit_jax.files import write_whole
from beit_jax.models.functional import Params, flatten, unflatten
from beit_jax.weights import adapt, foreign, keys, native
from beit_jax.weights.description import Description, describe, to_config
from beit_jax.weights.formats import hugging_face, timm, unilm
from beit_jax.weights.report import Report, WeightsError, check_names

FORMATS = ("hugging_face", "timm", "unilm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote.

    Attributes:
      output: the folder or file.
      report: of our names.
      load: the Python that loads it.
    """

    output: str
    report: Report
    load: str


def export_checkpoint(
    source: str,
    *,
    format: str,
    output: str,
    image_size: int | None = None,
    allow_unused: Iterable[str] = (),
) -> Exported:
    """Writes a checkpoint in a foreign format.

    Needs only the checkpoint and the config saved in it, on one CPU, whatever wrote it. PyTorch is
    needed for "unilm" alone.

    Args:
      source: a checkpoint, a run's directory, or a foreign checkpoint.
      format: "hugging_face" (a folder), "timm" (a .safetensors file) or "unilm" (a .pth file).
      output: what to write; replaced if it is there.
      image_size: another resolution to resize positions to.
      allow_unused: our names that may be left out.

    Raises:
      ConfigError: the source can't be read or does not fit its config.
    """
    one_of(format, "format", *FORMATS)
    params, description, config = read_any(source)
    shapes = {name: leaf.shape for name, leaf in description.shapes().items()}
    _, unused = check_names(
        shapes,
        {name: array.shape for name, array in params.items()},
        source=source,
        allow_unused=allow_unused,
    )
    params = {name: array for name, array in params.items() if name not in unused}
    params, description, reshaped = resized(params, description, image_size=image_size)
    left_out: list[str] = []
    if format == "timm":
        shared = description.model.positions == "relative_shared"
        params, description, left_out = timm.reduce(params, description)
        if shared:
            reshaped = [*reshaped, f"{adapt.SHARED_TABLE} → {adapt.BLOCK_TABLE}, copies"]
    state = keys.to_foreign(params, foreign.table_of(format, description))
    rebuilt: list[str] = []
    if format == "hugging_face":
        _write_hugging_face(output, state, description=description, config=config, source=source)
        name = hugging_face.CLASSES[description.task]
        load = f"transformers.{name}.from_pretrained({output!r})"
    elif format == "timm":
        _require_suffix(output, ".safetensors")
        write_safetensors(output, state, metadata=timm.metadata(description))
        load = timm.create_model_call(description, path=output)
    else:
        _require_suffix(output, ".pth")
        rebuilt = unilm.write(output, state, description=description)
        load = f"torch.load({output!r}, weights_only=True)['model']"
    report = Report(
        used=tuple(params),
        unused=(*unused, *left_out),
        rebuilt=tuple(rebuilt),
        reshaped=tuple(reshaped),
    )
    return Exported(output=output, report=report, load=load)


def import_checkpoint(
    source: str,
    *,
    output: str,
    image_size: int | None = None,
    per_block: bool = False,
    sha256: str = "",
    normalization: str = "",
    heads: int = 0,
    allow_missing: Iterable[str] = (),
    allow_unused: Iterable[str] = (),
) -> tuple[Report, Description, str]:
    """Writes a foreign checkpoint as one of ours, good for `config.run.init_from` and `export`.

    Args:
      source: a Hugging Face folder, a `.safetensors` of timm or a `.pth` of unilm.
      output: the folder to write.
      image_size: another resolution to resize positions to.
      per_block: copy a shared relative-position table to every block.
      sha256: what the file must have; "": not checked.
      normalization: see `foreign.read`.
      heads: see `foreign.read`.
      allow_missing: foreign keys that may be missing.
      allow_unused: foreign keys that may be left over.

    Returns:
      The report of foreign keys, what was imported, and the file's SHA-256.

    Raises:
      ConfigError: see `foreign.read`.
    """
    checkpoint = foreign.read(
        source,
        sha256=sha256,
        normalization=normalization,
        heads=heads,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
    )
    params, description = checkpoint.params, checkpoint.description
    reshaped: list[str] = []
    if per_block and description.model.positions == "relative_shared":
        params = adapt.per_block(params)
        model = dataclasses.replace(description.model, positions="relative_per_block")
        description = dataclasses.replace(description, model=model)
        reshaped.append(f"{adapt.SHARED_TABLE} → {adapt.BLOCK_TABLE}, copies")
    params, description, more = resized(params, description, image_size=image_size)
    config = to_config(description)
    config["imported_from"] = {"source": source, "sha256": checkpoint.sha256}
    native.write_params(output, unflatten(params), config=config)
    report = dataclasses.replace(checkpoint.report, reshaped=(*reshaped, *more))
    return report, description, checkpoint.sha256


def restore_params(
    source: str,
    *,
    shapes: Params,
    fresh: Callable[[], Params] | None = None,
    allow_missing: Iterable[str] = (),
    allow_unused: Iterable[str] = (),
    name: str = "config.run.init_from",
) -> Params:
    """Parameters for a warm start, from a checkpoint of ours or a foreign one.

    Where names and shapes are the stored ones, every device reads its own part. Otherwise the whole
    is read into memory and made to fit: another resolution, per-block copies of a shared table,
    and only what is allowed may be missing or left over.

    Args:
      source: a run's directory, a checkpoint, a Hugging Face folder, `.safetensors`, `.pth` or
        "hf:OWNER/NAME".
      shapes: the wanted parameters, `ShapeDtypeStruct`s with shardings.
      fresh: gives newly drawn parameters, for the missing ones; placed as `shapes`.
      allow_missing: our names that may be missing: a path, a module ("fc_norm") or a glob.
      allow_unused: names that may be left over; foreign keys that we have no name for too.
      name: the setting `source` came from, for messages.

    Returns:
      A nested dict of arrays, placed as `shapes`.

    Raises:
      ConfigError: nothing there, or it does not fit; everything that does not is named.
    """
    wanted = flatten(shapes)
    wanted_shapes = {path: tuple(leaf.shape) for path, leaf in wanted.items()}
    if not native.is_checkpoint(source) and foreign.is_foreign(source):
        try:
            checkpoint = foreign.read(source, allow_unused=allow_unused)
        except WeightsError as error:
            raise WeightsError(f"{name}: {error}") from None
        logging.info("%s: SHA-256 %s\n%s", source, checkpoint.sha256, checkpoint.report)
        params = checkpoint.params
    else:
        stored = flatten(native.saved_params_shapes(source, name=name))
        if {path: tuple(leaf.shape) for path, leaf in stored.items()} == wanted_shapes:
            return native.read_params(source, shapes=shapes, name=name)
        params = flatten(native.read_params(source, name=name))
    try:
        params, report = adapt.adapt(
            params,
            wanted_shapes,
            source=source,
            allow_missing=allow_missing,
            allow_unused=allow_unused,
        )
    except WeightsError as error:
        raise WeightsError(f"{name}: {error}") from None
    logging.info("%s, made to fit:\n%s", source, report)
    placed = {path: place(params[path], wanted[path]) for path in params}
    if report.missing:
        if fresh is None:
            raise WeightsError(f"{name}: {source} lacks {', '.join(report.missing)}")
        drawn = flatten(fresh())
        placed |= {path: drawn[path] for path in report.missing}
    return unflatten({path: placed[path] for path in wanted})


def place(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A host array, the same on every process, as a global array sharded as `like`."""
    array = np.asarray(array, like.dtype)
    if like.sharding is None:
        return jax.numpy.asarray(array)
    return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])


def read_any(
    source: str, *, normalization: str = "", heads: int = 0
) -> tuple[dict[str, np.ndarray], Description, dict[str, Any]]:
    """Parameters (flat, float32), description and saved config of any checkpoint we can read.

    `normalization` and `heads` are for formats that don't say: see `foreign.read`.
    """
    if not native.is_checkpoint(source) and foreign.is_foreign(source):
        checkpoint = foreign.read(source, normalization=normalization, heads=heads)
        config = to_config(checkpoint.description)
        config["imported_from"] = {"source": source, "sha256": checkpoint.sha256}
        return checkpoint.params, checkpoint.description, config
    config = native.saved_config(source)
    params = flatten(native.read_params(source))
    params = {name: np.asarray(array, np.float32) for name, array in params.items()}
    return params, describe(config), config


def resized(
    params: Mapping[str, np.ndarray], description: Description, *, image_size: int | None
) -> tuple[dict[str, np.ndarray], Description, list[str]]:
    """Parameters and description for another image size, and what was reshaped."""
    if image_size is None or image_size == description.model.image_size:
        return dict(params), description, []
    model = dataclasses.replace(description.model, image_size=image_size)
    try:
        result, reshaped = adapt.resize_to(params, grid=model.grid)
    except ValueError as error:
        raise WeightsError(str(error)) from None
    return result, dataclasses.replace(description, model=model), reshaped


def write_safetensors(
    path: str, state: Mapping[str, np.ndarray], *, metadata: dict[str, str]
) -> None:
    """Writes float32 tensors; readers see the old file or the whole new one."""
    # safetensors writes the bytes as they lie in memory: a transposed view would come out wrong.
    tensors = {key: np.array(array, np.float32, order="C") for key, array in state.items()}
    write_whole(path, safetensors.numpy.save(tensors, metadata=metadata))


def _write_hugging_face(
    folder: str,
    state: Mapping[str, np.ndarray],
    *,
    description: Description,
    config: Mapping[str, Any],
    source: str,
) -> None:
    path = epath.Path(folder)
    if path.exists() and not path.is_dir():
        raise WeightsError(f"{folder} is a file; a Hugging Face export is a folder")
    card = hugging_face.model_card(
        description, config=config, summary=_summary(source), source=source, name=path.name
    )
    for name, value in (
        ("config.json", hugging_face.config_json(description)),
        ("preprocessor_config.json", hugging_face.preprocessor_json(description)),
    ):
        write_whole(path / name, (json.dumps(value, indent=2) + "\n").encode())
    write_whole(path / "README.md", card.encode())
    # "format" is what transformers looks for first.
    write_safetensors(str(path / "model.safetensors"), state, metadata={"format": "pt"})


def _summary(source: str) -> dict[str, Any]:
    """The run's `summary.json`; else the last numbers in `metrics.jsonl`; else nothing."""
    here = epath.Path(source)
    for folder in (here, here.parent.parent):  # a workdir, or <workdir>/checkpoints/<step>
        if (folder / "summary.json").exists():
            return json.loads((folder / "summary.json").read_text())
        if (folder / "metrics.jsonl").exists():
            numbers: dict[str, Any] = {}
            for line in (folder / "metrics.jsonl").read_text().splitlines():
                try:
                    numbers |= json.loads(line)
                except ValueError:  # cut off by a kill
                    continue
            return numbers
    return {}


def _require_suffix(output: str, suffix: str) -> None:
    if not output.endswith(suffix):
        raise WeightsError(f"--output: {output} must end in {suffix}")
