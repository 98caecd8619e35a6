"""Whole conversions: a checkpoint to a foreign format, a foreign file to a checkpoint.

    export_checkpoint("runs/quickstart/pretrain", format="hugging_face", output="exported")
    import_checkpoint("beit_base_patch16_224_pt22k.pth", output="imported")
    restore_params("hf:microsoft/beit-base-patch16-224", shapes=shapes)  # config.run.init_from

The report of every conversion lists what became of each name, and a name that is missing or left
over is an error unless it was allowed.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from beit_jax.config import ConfigError, check, one_of
from beit_jax.config.facts import FACTS
from beit_jax.models.functional import flatten, unflatten
from beit_jax.progress import waiting
from beit_jax.types import FlatParams, JsonObject, Params, PyTree, Variables
from beit_jax.weights import adapt, foreign, hub, native, opening
from beit_jax.weights.description import KINDS, Description, describe, to_config
from beit_jax.weights.formats import FORMATS, Export, Format, Written
from beit_jax.weights.formats.format import NOTHING_STATED, STATED_ELSEWHERE, Stated
from beit_jax.weights.report import Report, WeightsError, check_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of an export.

    Attributes:
      output: the folder or file.
      report: of this project's names.
      load: the Python that loads it.
      commit: the address of the commit on the hub; "" where nothing was pushed.
    """

    output: str
    report: Report
    load: str
    commit: str = ""


def export_checkpoint(
    source: str,
    *,
    format: str,
    output: str,
    image_size: int | None = None,
    per_block: bool = False,
    sha256: str = "",
    stated: Stated = NOTHING_STATED,
    allow_missing: Iterable[str] = (),
    allow_unused: Iterable[str] = (),
    push: str = "",
    private: bool = False,
) -> Exported:
    """Writes a checkpoint in a foreign format, on one CPU, on whatever devices it was written.

    Args:
      source: a checkpoint, a run's directory, a foreign checkpoint or "hf:OWNER/NAME".
      format: a key of `formats.FORMATS`.
      output: the folder or file to write; replaced if it is there.
      image_size: another resolution to resize positions to.
      per_block: copy a shared relative-position table to every block.
      sha256, stated, allow_missing: see `foreign.read`.
      allow_unused: parameters, or a foreign file's keys, that may be left out.
      push: "OWNER/NAME", a repository on the hub to upload the result to; "" for none.
      private: whether a repository that the push creates is private.

    Raises:
      ConfigError: the source can't be read or does not fit its config, the output has another
        suffix than the format's, or the push fails.
    """
    target = _target(format, output=output, push=push, private=private)
    left = tuple(allow_unused)
    with _reading(source):
        read = read_any(
            source, sha256=sha256, stated=stated, allow_missing=allow_missing, allow_unused=left
        )
    params, unused = _fitting(read, target, source=source, allow_unused=left)
    params, description, copied = _with_tables(params, read.description, per_block=per_block)
    params, description, reshaped = resized(params, description, image_size=image_size)
    written = _write(
        target,
        output=output,
        params=params,
        description=description,
        config=read.config,
        source=source,
    )
    commit = _push(written, output, repository=push, private=private, format=format)
    report = dataclasses.replace(
        read.report,
        used=written.used,
        unused=(*unused, *written.left_out),
        rebuilt=written.rebuilt,
        reshaped=(*copied, *reshaped, *written.reshaped),
        cast=(),
        notes=(*read.report.notes, *written.notes),
    )
    return Exported(output=output, report=report, load=written.load, commit=commit)


def _reading(source: str) -> contextlib.AbstractContextManager[None]:
    """Shows how long reading takes, where it shows nothing itself, as downloads from the hub do."""
    return waiting(f"reading {source}", shown=not source.startswith(hub.PREFIXES))


def _write(
    target: Format,
    *,
    output: str,
    params: FlatParams,
    description: Description,
    config: JsonObject,
    source: str,
) -> Written:
    """Writes an export, and shows how long that takes; the arguments are those of `Export`."""
    export = Export(
        output=output,
        params=params,
        description=description,
        config=config,
        metrics=native.saved_metrics(source),
        source=source,
    )
    with waiting(f"writing {output}"):
        return target.write(export)


def _target(format: str, *, output: str, push: str, private: bool) -> Format:
    """The format to write, with everything checked that would fail after minutes of converting."""
    one_of(format, "format", *FORMATS)
    check(bool(push) or not private, "--private", "only with --push")
    FORMATS[format].check_output(output)
    if push:
        hub.check(push)
    return FORMATS[format]


def _check_kind(target: Format, description: Description, *, source: str) -> None:
    """Raises WeightsError where a format has no models of this kind."""
    if description.task not in target.kinds:
        others = [row.name for row in FORMATS.values() if description.task in row.kinds]
        raise WeightsError(
            f"{source} is {KINDS[description.task].head(description)}, which {target.name} does"
            f" not hold; {' and '.join(others)} can"
        )


def _fitting(
    read: "Read", target: Format, *, source: str, allow_unused: Iterable[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The parameters that the description names, all of them, and the names of allowed others."""
    _check_kind(target, read.description, source=source)
    if read.report.missing:
        raise WeightsError(
            f"{source} lacks {', '.join(read.report.missing)}, without which nothing can be"
            " exported; import can go on without"
        )
    _, unused = check_names(
        {name: leaf.shape for name, leaf in read.description.shapes().items()},
        {name: array.shape for name, array in read.params.items()},
        source=source,
        allow_unused=allow_unused,
    )
    return {name: array for name, array in read.params.items() if name not in unused}, unused


def _push(written: Written, output: str, *, repository: str, private: bool, format: str) -> str:
    """Uploads an export; gives the commit's address, "" where no repository is named."""
    if not repository:
        return ""
    files = written.files or {os.path.basename(output): output}
    message = f"Export as {format} by beit_jax"
    return hub.push(files, repository=repository, private=private, message=message)


def import_checkpoint(
    source: str,
    *,
    output: str,
    image_size: int | None = None,
    per_block: bool = False,
    sha256: str = "",
    stated: Stated = NOTHING_STATED,
    allow_missing: Iterable[str] = (),
    allow_unused: Iterable[str] = (),
) -> tuple[Report, Description, str]:
    """Writes a foreign checkpoint as one of this project's, for `config.run.init_from` and export.

    Args:
      source: a file or folder that `foreign.read` takes, or "hf:OWNER/NAME".
      output: the folder to write.
      image_size: another resolution to resize positions to.
      per_block: copy a shared relative-position table to every block.
      sha256: what the file must have; "" skips the check.
      stated: facts that the file may not say.
      allow_missing: foreign keys that may be missing.
      allow_unused: foreign keys that may be left over.

    Returns:
      The report of foreign keys, what was imported, and the file's SHA-256.

    Raises:
      ConfigError: see `foreign.read`.
    """
    with _reading(source):
        checkpoint = foreign.read(
            source,
            sha256=sha256,
            stated=stated,
            allow_missing=allow_missing,
            allow_unused=allow_unused,
        )
    params, description, reshaped = _with_tables(
        checkpoint.params, checkpoint.description, per_block=per_block
    )
    params, description, more = resized(params, description, image_size=image_size)
    config = to_config(description) | _imported_from(source, checkpoint)
    trained, variables = description.split(params)
    with waiting(f"writing {output}"):
        native.write_params(
            output, unflatten(trained), config=config, variables=unflatten(variables)
        )
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
    """Reads parameters for a warm start, from a native checkpoint or a foreign one.

    Where names and shapes are the stored ones, every device reads its own part. Otherwise the whole
    is read into memory and made to fit: another resolution, per-block copies of a shared table,
    and only what is allowed may be missing or left over. What names and shapes do not show is
    compared by `facts.check`. Every process reads or downloads the source itself.

    Args:
      source: a run's directory, a checkpoint, a Hugging Face folder, `.safetensors`, `.pth` or
        "hf:OWNER/NAME".
      shapes: the wanted parameters, `ShapeDtypeStruct`s with shardings.
      fresh: gives newly drawn parameters, for the missing ones; sharded as `shapes`.
      allow_missing: parameters that may be missing: a path, a module ("fc_norm") or a glob.
      allow_unused: parameters that may be left over, and foreign keys without a parameter.
      name: the setting `source` came from, for messages.

    Returns:
      A nested dict of arrays, sharded as `shapes`.

    Raises:
      ConfigError: nothing there, or it does not fit; everything that does not is named.
    """
    wanted = flatten(shapes)
    wanted_shapes = {path: tuple(leaf.shape) for path, leaf in wanted.items()}
    is_native = native.is_checkpoint(source) or not opening.is_foreign(source)
    if is_native:
        stored = flatten(native.saved_params_shapes(source, name=name))
        if _shapes_and_dtypes(stored) == _shapes_and_dtypes(wanted):
            return native.read_params(source, shapes=shapes, name=name)
    try:
        if is_native:
            params = flatten(native.read_params(source, name=name))
        else:
            params = _foreign_params(source, allow_unused=allow_unused)
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
    if report.missing and fresh is None:
        raise WeightsError(f"{name}: {source} lacks {', '.join(report.missing)}")
    drawn = flatten(fresh()) if report.missing and fresh is not None else {}
    placed = {path: to_devices(array, wanted[path]) for path, array in params.items()}
    return unflatten({path: placed.get(path, drawn.get(path)) for path in wanted})


def _shapes_and_dtypes(flat: Mapping[str, PyTree]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in flat.items()}


def _foreign_params(source: str, *, allow_unused: Iterable[str]) -> dict[str, np.ndarray]:
    """The parameters of a foreign file that starts a model with settings of its own."""
    checkpoint = foreign.read(source, stated=STATED_ELSEWHERE, allow_unused=allow_unused)
    # Of what is not in the file, the model's own facts are taken (`facts`), not guesses.
    guessed = tuple(f"{k} {text}" for k, text in checkpoint.guessed.items() if k not in FACTS)
    report = dataclasses.replace(checkpoint.report, guessed=guessed)
    logging.info("%s: SHA-256 %s\n%s", source, checkpoint.sha256, report)
    params, _ = checkpoint.description.split(checkpoint.params)
    return params


def restore_variables(
    source: str,
    *,
    shapes: Variables,
    fresh: Callable[[], Variables],
    allow_unused: Iterable[str] = (),
    name: str = "config.run.init_from",
) -> Variables:
    """Variables for a warm start: of each layer those of `source`, or fresh ones.

    Running statistics fit only the layer they were taken at, so they are not adapted as parameters
    are: a layer that the source has with other names or shapes, or not at all, starts fresh, which
    is logged. A layer that only the source has is left out.

    Args:
      source: as for `restore_params`.
      shapes: the wanted variables, `ShapeDtypeStruct`s with shardings.
      fresh: gives new variables, placed as `shapes`.
      allow_unused: foreign keys without a parameter that may be left over.
      name: the setting `source` came from, for messages.

    Raises:
      ConfigError: there is no such checkpoint, or it can't be read.
    """
    if not shapes:
        return {}
    wanted = flatten(shapes)
    if native.is_checkpoint(source) or not opening.is_foreign(source):
        stored = flatten(native.saved_params_shapes(source, name=name, part="variables"))
        if _shapes_of(stored) == _shapes_of(wanted):
            return native.read_params(source, shapes=shapes, name=name, part="variables")
        found = flatten(native.read_params(source, name=name, part="variables")) if stored else {}
    else:
        try:
            checkpoint = foreign.read(source, stated=STATED_ELSEWHERE, allow_unused=allow_unused)
        except WeightsError as error:
            raise WeightsError(f"{name}: {error}") from None
        _, found = checkpoint.description.split(checkpoint.params)
    there, here = _by_layer(found), _by_layer(wanted)
    known = {layer for layer in here if there.get(layer) == here[layer]}
    unknown = sorted(here.keys() - known)
    if unknown:
        few = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        logging.info("running statistics start fresh, since %s lacks them: %s", source, few)
    if not known:
        return fresh()
    drawn = flatten(fresh()) if unknown else {}
    return unflatten(
        {
            path: to_devices(found[path], leaf) if _layer(path) in known else drawn[path]
            for path, leaf in wanted.items()
        }
    )


def _by_layer(flat: Mapping[str, PyTree]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of each layer's variables."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, shape in _shapes_of(flat).items():
        layers.setdefault(_layer(path), {})[path] = shape
    return layers


def _layer(path: str) -> str:
    return path.rpartition("/")[0]


def _shapes_of(flat: Mapping[str, PyTree]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in flat.items()}


def to_devices(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Puts a host array, the same on every process, on devices, sharded as `like`."""
    array = np.asarray(array, like.dtype)
    if like.sharding is None:
        return jax.numpy.asarray(array)
    return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])


class Read(NamedTuple):
    """A checkpoint in memory.

    Attributes:
      params: flat, float32; the variables of a model that has some are among them.
      description: what they are.
      config: as saved with them.
      report: of a foreign checkpoint's keys; empty for one of this project's.
    """

    params: dict[str, np.ndarray]
    description: Description
    config: JsonObject
    report: Report


def read_any(
    source: str,
    *,
    sha256: str = "",
    stated: Stated = NOTHING_STATED,
    allow_missing: Iterable[str] = (),
    allow_unused: Iterable[str] = (),
) -> Read:
    """Reads a checkpoint, native or in any format that can be read, or "hf:OWNER/NAME".

    Args:
      source: its path or name.
      sha256: what a foreign file must have; "" skips the check.
      stated: facts in place of what the checkpoint says, or where a foreign file does not.
      allow_missing, allow_unused: see `foreign.read`; of no meaning to a native checkpoint.

    Raises:
      ConfigError: nothing there, it can't be read, or it contradicts `stated`.
    """
    if not native.is_checkpoint(source) and opening.is_foreign(source):
        checkpoint = foreign.read(
            source,
            sha256=sha256,
            stated=stated,
            allow_missing=allow_missing,
            allow_unused=allow_unused,
        )
        config = to_config(checkpoint.description) | _imported_from(source, checkpoint)
        return Read(checkpoint.params, checkpoint.description, config, checkpoint.report)
    config = native.saved_config(source)
    try:
        description = describe(config)
    except ConfigError as error:  # of a tokenizer's run, say
        raise WeightsError(f"{source}: {error}") from None
    if stated.heads and stated.heads != description.model.heads:
        raise WeightsError(f"heads: {stated.heads}, but {source} says {description.model.heads}")
    part = "ema" if stated.weights == "ema" else "params"
    if not native.saved_params_shapes(source, part=part):
        raise WeightsError(f"{source} has no average of its weights: --weights model")
    params = flatten(native.read_params(source, part=part))
    if description.variables():
        params |= flatten(native.read_params(source, part="variables"))
    params = {name: np.asarray(array, np.float32) for name, array in params.items()}
    guessed = config.get("imported_from", {}).get("guessed", {})
    report = Report(guessed=tuple(f"{name} {text}" for name, text in guessed.items()))
    return Read(params, stated.over(description), config, report)


def _imported_from(source: str, checkpoint: foreign.Checkpoint) -> JsonObject:
    """What is saved about a file that a checkpoint was imported from."""
    return {
        "imported_from": {
            "source": source,
            "sha256": checkpoint.sha256,
            "guessed": dict(checkpoint.guessed),
            "kept": checkpoint.kept,
        }
    }


def _with_tables(
    params: dict[str, np.ndarray], description: Description, *, per_block: bool
) -> tuple[dict[str, np.ndarray], Description, list[str]]:
    """A copy of a shared relative-position table for every block, where that is asked for."""
    if not per_block or description.model.positions != "relative_shared":
        return params, description, []
    model = dataclasses.replace(description.model, positions="relative_per_block")
    copied = f"{adapt.SHARED_TABLE} → {adapt.BLOCK_TABLE}, copies"
    return adapt.per_block(params), dataclasses.replace(description, model=model), [copied]


def resized(
    params: FlatParams, description: Description, *, image_size: int | None
) -> tuple[dict[str, np.ndarray], Description, list[str]]:
    """Resizes tables and positions to another image size.

    Returns:
      Parameters, their description, and what was reshaped, for a `Report`.

    Raises:
      WeightsError: the stored grid is too small to interpolate from.
    """
    if image_size is None or image_size == description.model.image_size:
        return dict(params), description, []
    model = dataclasses.replace(description.model, image_size=image_size)
    try:
        result, reshaped = adapt.resize_to(params, grid=model.grid)
    except ValueError as error:
        raise WeightsError(str(error)) from None
    return result, dataclasses.replace(description, model=model), reshaped
