"""DALL-E's tokenizer weights → the safetensors file that `tokenizers` loads.

Four sources, one table: `encoder.pkl` and `decoder.pkl` as OpenAI published them (whole pickled
modules), their state dicts (OpenMMLab's `dalle_encoder.pth`), and FLAVA's image codebook, which is
the encoder under other names (transformers `convert_dalle_to_flava_codebook.py`).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from beit_jax.models.functional import flatten, unflatten
from beit_jax.tokenizers.dalle import BLOCKS_PER_GROUP, GROUPS, DalleConfig, dalle_networks
from beit_jax.tokenizers.loading import save_params
from beit_jax.weights import foreign, keys, pickles
from beit_jax.weights.keys import CONV, Table, row
from beit_jax.weights.report import Report, WeightsError, check_names


def _conv(foreign_prefix: str, ours: str) -> Table:
    return (
        row(f"{foreign_prefix}.w", f"{ours}/kernel", CONV),
        row(f"{foreign_prefix}.b", f"{ours}/bias"),
    )


def _table() -> Table:
    rows = [*_conv("blocks.input", "input")]
    for group in range(1, GROUPS + 1):
        for block in range(1, BLOCKS_PER_GROUP + 1):
            theirs = f"blocks.group_{group}.block_{block}"
            ours = f"group_{group}/block_{block}"
            rows += _conv(f"{theirs}.id_path", f"{ours}/identity")
            for conv in range(1, 5):
                rows += _conv(f"{theirs}.res_path.conv_{conv}", f"{ours}/conv_{conv}")
    return (*rows, *_conv("blocks.output.conv", "output"))


# The same for encoder and decoder; a block without an identity convolution skips that row.
TABLE: Table = _table()
# Put before the names by training code that holds the tokenizer as a part.
_PREFIXES = ("module.", "image_codebook.", "target_generator.", "encoder.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertedTokenizer:
    """What `convert_tokenizer` did.

    Attributes:
      output: the file written.
      sha256: of that file, for `config.tokenizer.sha256`.
      sources: "encoder" and "decoder" → SHA-256 of the files read.
      reports: "encoder" and "decoder" → report.
      config: the settings the file fits.
    """

    output: str
    sha256: str
    sources: dict[str, str]
    reports: dict[str, Report]
    config: DalleConfig


def original_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """FLAVA's and prefixed names → the original ones; others stay."""
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): array for key, array in state.items()}
    result = {}
    for key, array in state.items():
        name = re.sub(r"(group_\d)\.group\.", r"\1.", key).replace("res_path.path.", "res_path.")
        name = re.sub(r"\.weight$", ".w", re.sub(r"\.bias$", ".b", name))
        result[name] = array
    return result


def convert_tokenizer(
    *,
    output: str,
    encoder: str,
    decoder: str = "",
    encoder_sha256: str = "",
    decoder_sha256: str = "",
    vocabulary: int = 8192,
    width: int = 256,
) -> ConvertedTokenizer:
    """Writes DALL-E's weights as one tokenizer file.

    Args:
      output: the safetensors file.
      encoder: a pickled module, a state dict (.pth, .bin, .safetensors), or FLAVA's codebook.
      decoder: the same; "": none. Only pictures of tokens need it.
      encoder_sha256: what the file must have; "": not checked.
      decoder_sha256: likewise.
      vocabulary: tokens the codebook must have.
      width: hidden channels, 256 in the published weights.

    Raises:
      WeightsError: a file is missing, damaged, refused, not what is expected, or does not fit.
    """
    if not output.endswith(".safetensors"):
        raise WeightsError(f"--output: {output} must end in .safetensors")
    config = DalleConfig(path=output, vocabulary=vocabulary, width=width)
    files = {"encoder": (encoder, encoder_sha256), "decoder": (decoder, decoder_sha256)}
    params, sources, reports = {}, {}, {}
    for part, (path, sha256) in files.items():
        if not path:
            continue
        content = pickles.read_bytes(path)
        sources[part] = foreign.check_sha256(content, sha256, source=path)
        if path.endswith(".safetensors"):
            state, _ = foreign.load_safetensors(content, source=path)
        else:
            state = foreign.state_dict(pickles.loads(content, source=path), source=path)
        params[part], reports[part] = to_params(state, part=part, config=config, source=path)
    save_params(output, params, config=config)
    return ConvertedTokenizer(
        output=output,
        sha256=foreign.check_sha256(pickles.read_bytes(output), "", source=output),
        sources=sources,
        reports=reports,
        config=config,
    )


def to_params(
    state: Mapping[str, np.ndarray], *, part: str, config: DalleConfig, source: str
) -> tuple[dict[str, Any], Report]:
    """One network's state dict → nested parameters, strictly.

    Args:
      state: original or FLAVA names.
      part: "encoder" or "decoder".
      config: width and vocabulary that are expected.
      source: for messages.
    """
    some = ", ".join(list(state)[:3])
    state = original_names(state)
    first, last = state.get("blocks.input.w"), state.get("blocks.output.conv.w")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        raise WeightsError(f"{source} is not DALL-E's {part}: its keys are {some}, ...")
    is_encoder = first.shape[-1] == 7
    if is_encoder != (part == "encoder"):
        other = "encoder" if is_encoder else "decoder"
        raise WeightsError(f"{source} is DALL-E's {other}, needed here: the {part}")
    vocabulary = last.shape[0] if is_encoder else first.shape[1]
    if vocabulary != config.vocabulary:
        raise WeightsError(
            f"{source} has a vocabulary of {vocabulary} tokens, expected {config.vocabulary}"
            " (--vocabulary)"
        )
    network = dalle_networks(config)[part]
    shapes = {name: leaf.shape for name, leaf in flatten(network.shapes()).items()}
    wanted = keys.foreign_shapes(shapes, TABLE)
    check_names(wanted, {key: a.shape for key, a in state.items()}, source=source)
    cast = tuple(f"{k} ({a.dtype})" for k, a in state.items() if a.dtype != np.float32)
    params = unflatten(keys.to_ours(state, TABLE, layers=0))
    return params, Report(used=tuple(wanted), cast=cast)


def to_state(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One network's nested parameters → a state dict that the original module loads."""
    return keys.to_foreign({k: np.asarray(a) for k, a in flatten(params).items()}, TABLE)
