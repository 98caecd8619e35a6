"""What a checkpoint or a file of weights holds, as text."""

import numpy as np
from etils import epath

from beit_jax.models.functional import flatten
from beit_jax.weights import foreign, hub, native, pickles
from beit_jax.weights.description import Description, describe


def inspect(source: str) -> str:
    """Format, architecture, SHA-256, and every name with dtype and shape.

    Args:
      source: a checkpoint of ours, a foreign one, or a tokenizer's file.

    Raises:
      ConfigError: it can't be read.
    """
    if native.is_checkpoint(source):
        shapes = flatten(native.saved_params_shapes(source))
        lines = ["format: beit_jax", f"checkpoint: {native.state_folder(source, name='').parent}"]
        lines.append(sentence(describe(native.saved_config(source))))
        return "\n".join([*lines, *_table(shapes)])
    if source.startswith(hub.PREFIX) or epath.Path(source).is_dir():
        opened = foreign.read_source(source)
        return _foreign(opened)
    content = pickles.read_bytes(source)
    sha256 = foreign.check_sha256(content, "", source=source)
    if source.endswith(".safetensors"):
        state, metadata = foreign.load_safetensors(content, source=source)
    else:
        metadata = {}
        state = foreign.state_dict(pickles.loads(content, source=source), source=source)
    if "cls_token" in state:
        return _foreign(foreign.read_source(source))
    lines = [f"format: tensors that are no BEiT's; metadata {metadata or 'none'}"]
    return "\n".join([*lines, f"SHA-256: {sha256}", *_table(state)])


def sentence(description: Description) -> str:
    """One line: the task and the sizes."""
    model = description.model
    head = {
        "pretrain": f"masked image modelling, {description.outputs} tokens",
        "classify": f"classification, {description.outputs} classes, pooling {description.pooling}",
        "encoder": "encoder without a head",
    }[description.task]
    return (
        f"{head}; {model.layers} layers, width {model.width}, {model.heads} heads, MLP"
        f" {model.mlp_width}; image {model.image_size}, patch {model.patch_size}; positions"
        f" {model.positions}, LayerScale {'yes' if model.layer_scale_init else 'no'};"
        f" normalization {description.normalization}"
    )


def _foreign(source: foreign.Source) -> str:
    description = foreign.describe_source(source)
    lines = [f"format: {source.format}", f"SHA-256: {source.sha256}", sentence(description)]
    return "\n".join([*lines, *_table(source.state)])


def _table(arrays) -> list[str]:
    count = sum(int(np.prod(a.shape)) for a in arrays.values())
    rows = [f"  {name}  {np.dtype(a.dtype).name} {tuple(a.shape)}" for name, a in arrays.items()]
    return [f"{len(rows)} tensors, {count:,} numbers", *rows]
