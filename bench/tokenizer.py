"""The tokenizer in bfloat16 against float32: how many ids differ on photographs, and by how much.

    python bench/tokenizer.py --images=DIR [--weights=FILE] [--count=16] [--json=FILE]

Photographs go through the training views (crop, jitter, flip, the tokenizer's image size). Three
encoders tokenise them: float32; bfloat16 by `config.tokenizer.dtype`, with the last convolution in
float32; and bfloat16 throughout. Where an id differs, its margin says how wrong it is: the distance
of its float32 logit from the best one, beside the usual distance between the best and the second.
Without `--weights` DALL-E's architecture has random weights, which shows the effect of rounding but
not the released weights'.

It also compares the time of scoring 75 of 196 positions with that of scoring all: processor time on
a CPU, else seconds.
"""

import argparse
import json
import platform
import statistics
import time
from typing import Any

from machine import processor_name, save  # beside this file

from beit_jax.text_table import text_table

VARIANTS = ("bfloat16", "bfloat16 throughout")
MARGINS = ("margin_median", "margin_max")
SLOTS = 75 / 196  # the share of positions that BEiT scores


def main() -> None:
    """Measures, prints tables and writes JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="a folder of photographs")
    parser.add_argument("--weights", default="", help="a tokenizer.safetensors")
    parser.add_argument("--size", type=int, default=112, help="of the tokenizer's view, in pixels")
    parser.add_argument("--count", type=int, default=16, help="photographs")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3, help="timed pairs of batches")
    parser.add_argument("--width", type=int, default=256, help="of random weights")
    parser.add_argument("--json", default="")
    flags = parser.parse_args()

    import jax

    result = measure(flags)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": jax.devices()[0].device_kind
        if jax.default_backend() != "cpu"
        else processor_name(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        **result,
    }
    show(result)
    save(result, flags.json)


def open_config(flags: argparse.Namespace) -> Any:
    """The tokenizer that the weights' file describes, or DALL-E's with random weights."""
    from safetensors import safe_open

    from beit_jax.config import fixed_settings
    from beit_jax.tokenizers.dalle import DalleConfig
    from beit_jax.tokenizers.kinds import KINDS
    from beit_jax.tokenizers.loading import METADATA_KEY

    if not flags.weights:
        return DalleConfig(random_weights=True, image_size=flags.size, width=flags.width)
    with safe_open(flags.weights, "numpy") as file:
        settings = json.loads(file.metadata()[METADATA_KEY])
    config = KINDS[settings["kind"]].config
    fixed = {name: settings[name] for name in fixed_settings(config)}
    return config(path=flags.weights, image_size=flags.size, **fixed)


def photographs(flags: argparse.Namespace) -> list[Any]:
    """Batches of uint8 `[b, size, size, 3]`: training views of one pass."""
    from beit_jax.config import DataConfig
    from beit_jax.data import pipeline, sources, views

    config = DataConfig(
        source=f"folder:{flags.images}",
        eval_source=f"folder:{flags.images}",  # nothing is held out
        token_image_size=flags.size,
        workers=1,
    )
    batches = pipeline.training_batches(
        sources.open_source(config, training=True),
        config=config,
        views=views.pretraining_views(config, grid=14, keys=("token_image",)),
        seed=0,
        batch_size=flags.batch,
    )
    return [next(batches)["token_image"] for _ in range(max(1, flags.count // flags.batch))]


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Everything but the date and the machine."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from beit_jax.tokenizers.loading import load_params, open_tokenizer

    config = open_config(flags)
    batches = photographs(flags)
    exact, half = (
        open_tokenizer(dataclasses.replace(config, dtype=dtype), precision=precision)
        for dtype, precision in (("float32", jax.lax.Precision.HIGHEST), ("bfloat16", None))
    )
    params = exact.encoding_params(load_params(config))

    def throughout(params: Any, images: jax.Array) -> jax.Array:
        features = half.pixel_features(params, images.astype(jnp.float32) / 255)
        rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), params)
        logits = half.feature_logits(rounded, features.astype(jnp.bfloat16))
        return jnp.argmax(logits.astype(jnp.bfloat16), axis=-1)

    compare = jax.jit(
        lambda params, images: (
            exact.logits(params, images),
            half.encode(params, images),
            throughout(params, images),
        )
    )
    margins: dict[str, list[float]] = {name: [] for name in VARIANTS}
    gaps, spread, positions, codes = [], [], 0, set()
    for images in batches:
        logits, *others = (np.asarray(array) for array in compare(params, images))
        best_two = np.partition(logits, -2, axis=-1)[..., -2:]
        gaps.append((best_two[..., 1] - best_two[..., 0]).ravel())
        spread.append(logits.std(axis=-1).ravel())
        positions += gaps[-1].size
        codes |= set(logits.argmax(-1).ravel().tolist())
        for name, ids in zip(VARIANTS, others, strict=True):
            chosen = np.take_along_axis(logits, ids[..., None].astype(int), axis=-1)[..., 0]
            # A tie is an agreement: both tokens score the same.
            margin = best_two[..., 1] - chosen
            margins[name] += margin[margin > 0].tolist()
    gap = np.concatenate(gaps)
    agreement = {}
    for name, values in margins.items():
        agreement[name] = {
            "agreement": 1 - len(values) / positions,
            "differing": len(values),
            "margin_median": float(np.median(values)) if values else 0.0,
            "margin_max": max(values, default=0.0),
        }
    return {
        "weights": "trained" if config.path else "random",
        "tokenizer": {
            "kind": config.kind,
            "width": config.width,
            "vocabulary": config.vocabulary,
            "image_size": config.image_size,
        },
        "photographs": sum(len(batch) for batch in batches),
        "positions": positions,
        "codes_used": len(codes),
        "best_minus_second_median": float(np.median(gap)),
        "logits_standard_deviation": float(np.median(np.concatenate(spread))),
        "against_float32": agreement,
        "stages": stages(config, params, batches[0]),
        **times(flags, config, params, batches[0]),
    }


def stages(config: Any, params: Any, images: Any) -> dict[str, float]:
    """Relative error of bfloat16 after each stage, root mean square; DALL-E's only."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from beit_jax.tokenizers.dalle import DalleConfig, dalle_networks, map_pixels

    if not isinstance(config, DalleConfig):
        return {}

    @jax.jit
    def errors(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        pixels = map_pixels(images.astype(jnp.float32) / 255)
        full, half = (
            dalle_networks(dataclasses.replace(config, dtype=dtype))["encoder"].apply(
                params["encoder"], pixels, method="stages"
            )
            for dtype in ("float32", "bfloat16")
        )
        return {
            name: jnp.sqrt(
                jnp.mean(jnp.square(half[name].astype(jnp.float32) - exact))
                / jnp.mean(jnp.square(exact))
            )
            for name, exact in full.items()
        }

    found = errors(params, images[:2])
    # jit sorts names; the encoder's order is the order of computation.
    order = ["input", *sorted(name for name in found if "/" in name), "output"]
    return {name: float(found[name]) for name in order}


def times(flags: argparse.Namespace, config: Any, params: Any, images: Any) -> dict[str, Any]:
    """Seconds a batch for all positions and for the share that BEiT scores, alternating."""
    import jax
    import numpy as np

    from beit_jax.tokenizers.loading import open_tokenizer

    tokenizer = open_tokenizer(config)
    count = config.grid**2
    k = round(SLOTS * count)
    rng = np.random.default_rng(0)
    some = np.stack([np.sort(rng.permutation(count)[:k]) for _ in images]).astype(np.int32)
    encode = jax.jit(tokenizer.encode)
    runs = {
        "all": lambda: encode(params, images),
        "some": lambda: encode(params, images, positions=some),
    }
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    same = np.take_along_axis(np.asarray(runs["all"]()).reshape(len(images), -1), some, axis=1)
    equal = float((same == np.asarray(runs["some"]())).mean())
    for _ in range(flags.pairs):
        for name, run in runs.items():
            began = clock()
            jax.block_until_ready(run())
            seconds[name].append(clock() - began)
    ratios = [a / b for a, b in zip(seconds["all"], seconds["some"], strict=True)]
    return {
        "clock": "processor seconds" if clock is time.process_time else "seconds",
        "scored": {"positions": k, "of": count, "same_ids": equal},
        "seconds_per_batch": {name: statistics.median(times) for name, times in seconds.items()},
        "all_over_some": statistics.median(ratios),
        "ratios": ratios,
    }


def show(result: dict[str, Any]) -> None:
    """Prints what is in the JSON."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    settings = ", ".join(f"{name} {value}" for name, value in result["tokenizer"].items())
    print(f"{result['device']}; {versions}")
    print(f"{settings}; {result['weights']} weights")
    print(
        f"{result['photographs']} photographs, {result['positions']} positions,"
        f" {result['codes_used']} codes; float32 logits: best - second"
        f" {result['best_minus_second_median']:.4g} (median), standard deviation"
        f" {result['logits_standard_deviation']:.4g}"
    )
    rows = [
        (f"  {name}", f"{row['agreement']:.2%}", *(f"{row[key]:.4g}" for key in MARGINS))
        for name, row in result["against_float32"].items()
    ]
    titles = ("against float32", "same ids", "margin of the others: median", "largest")
    print(text_table([titles, *rows], align="lrrr"))
    for name, error in result["stages"].items():
        print(f"  bfloat16's relative error after {name:<18} {error:.4f}")
    scored, seconds = result["scored"], result["seconds_per_batch"]
    print(
        f"scoring {scored['positions']} of {scored['of']} positions: {seconds['some']:.3f} against"
        f" {seconds['all']:.3f} {result['clock']} a batch, {result['all_over_some']:.2f} times as"
        f" fast; {scored['same_ids']:.2%} the same ids"
    )


if __name__ == "__main__":
    main()
