"""What a checkpoint or a file of weights holds, as text."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from beit_jax.models.functional import flatten
from beit_jax.weights import foreign, native, opening
from beit_jax.weights.description import describe, sentence
from beit_jax.weights.formats.format import Stated
from beit_jax.weights.report import WeightsError


def inspect(source: str) -> str:
    """Lists format, architecture, SHA-256, and every name with dtype and shape.

    Args:
      source: a checkpoint of this project, a foreign one, "hf:OWNER/NAME", or a tokenizer's file.

    Raises:
      ConfigError: it can't be read.
    """
    if native.is_checkpoint(source):
        shapes = flatten(native.saved_params_shapes(source))
        shapes |= flatten(native.saved_params_shapes(source, part="variables"))
        lines = ["format: beit_jax", f"checkpoint: {native.state_folder(source, name='').parent}"]
        config = native.saved_config(source)
        lines.append(sentence(describe(config)))
        guessed = config.get("imported_from", {}).get("guessed", {})
        lines += [f"guessed: {name} {text}" for name, text in guessed.items()]
        return "\n".join([*lines, *_table(shapes)])
    opened = opening.open_file(source)
    found = foreign.detect(opened)
    if found is None or found.reader is None:
        metadata = dict(opened.metadata) or "none"
        lines = [f"format: tensors that are not a BEiT's; metadata {metadata}"]
        return "\n".join([*lines, f"SHA-256: {opened.sha256}", *_table(opened.state)])
    opened = dataclasses.replace(opened, state=found.reader.canonical(opened.state))
    lines = [f"format: {found.name}", f"SHA-256: {opened.sha256}"]
    try:
        described = found.reader.describe(opened, stated=Stated())
        lines.append(sentence(described.description))
        lines += [f"guessed: {name} {text}" for name, text in described.guessed.items()]
        lines += described.notes
    except WeightsError as error:  # a file without its config.json still has names and shapes
        lines.append(f"not read: {error}")
    return "\n".join([*lines, *opened.notes, *_table(opened.state)])


def _table(arrays: Mapping[str, np.ndarray | jax.ShapeDtypeStruct]) -> list[str]:
    count = sum(int(np.prod(a.shape)) for a in arrays.values())
    rows = [f"  {name}  {np.dtype(a.dtype).name} {tuple(a.shape)}" for name, a in arrays.items()]
    return [f"{len(rows)} tensors, {count:,} numbers", *rows]
