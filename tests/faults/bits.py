"""Single bits flipped in what a run stores: noticed, or nothing else is read for it.

A flip is drawn half the time from all files alike, so that metadata have their share, and otherwise
from all bytes alike.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from absl import logging as absl_logging
from PIL import Image

from beit_jax import weights
from beit_jax.config import ConfigError, OptimizerConfig, RunConfig
from beit_jax.data import prepare
from beit_jax.data.sources import prepared
from beit_jax.models.functional import flatten, unflatten
from beit_jax.tasks import token_cache
from beit_jax.tokenizers.dvae import DvaeConfig
from beit_jax.tokenizers.loading import TokenizerFileError, load_params, open_tokenizer, save_params
from beit_jax.training import checkpoint, optim, sharding
from beit_jax.training.state import Task, TrainState, init_state, state_shapes
from beit_jax.weights import native
from beit_jax.weights.description import Description, to_config
from tests import tiny
from tests.faults.row import Row
from tests.weights.examples import random_params

MODEL = dataclasses.replace(tiny.TINY, layers=1, width=8, heads=2, mlp_width=16)
DESCRIPTION = Description(task="pretrain", model=MODEL, outputs=6)
RUN = RunConfig(steps=10, batch_size=8)
TOKENIZER = DvaeConfig(width=4, vocabulary=8, image_size=8, levels=2, codebook_width=4)
IMAGES = np.arange(2 * 16 * 16 * 3, dtype=np.uint8).reshape(2, 16, 16, 3)
# What a reader may raise: each of these is one line for the user.
NOTICED = (ConfigError, TokenizerFileError)


class Noticed(Exception):
    """What was stored was found out to be damaged, and something else was done."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One way of reading something that is stored.

    Attributes:
      files: the files, below the stored folder, in which bits are flipped.
      read: a folder → all that is read from it, anything that `same` compares.
    """

    files: str
    read: Callable[[Path], Any]


def soak(*, count: int, seed: int, folder: Path) -> Row:
    """Flips `count` single bits, in every kind of file in turn.

    Survived is what was noticed in one line, and what was read as if no bit had changed.
    """
    whole = folder / "whole"
    store(whole)
    outcomes: collections.Counter[str] = collections.Counter()
    failures = []
    kinds = targets()
    with _quiet():
        expected = {name: _read_copy(target, whole, folder) for name, target in kinds.items()}
        for number in range(count):
            name = list(kinds)[number % len(kinds)]
            chance = random.Random(f"{seed} {number}")
            copy = _copied(whole, folder)
            place = flip(copy, kinds[name].files, chance)
            outcome = outcome_of(kinds[name], copy, expected[name])
            outcomes[outcome.split(":")[0]] += 1
            if outcome not in ("noticed", "harmless"):
                failures.append(f"{name}, {place}, number {number} of seed {seed}: {outcome}")
    return Row(
        part="bits",
        tried=count,
        survived=count - len(failures),
        failures=tuple(failures),
        note=", ".join(f"{outcome} {times}" for outcome, times in sorted(outcomes.items())),
    )


def targets() -> dict[str, Target]:
    """Every way of reading, by name."""
    newest = "run/checkpoints/4/**/*"
    return {
        "resume": Target(files=newest, read=_resume),
        "parameters": Target(
            files=newest, read=lambda folder: native.read_params(str(folder / "run"))
        ),
        "init_from": Target(files=newest, read=_init_from),
        "export": Target(files=newest, read=_export),
        "resume again": Target(files=newest, read=_resume),
        "best": Target(files="run/best/checkpoints/**/*", read=_best),
        "imported": Target(files="imported/**/*", read=_imported),
        "tokenizer": Target(
            files="tokenizer.safetensors",
            read=lambda folder: load_params(
                dataclasses.replace(TOKENIZER, path=str(folder / "tokenizer.safetensors"))
            ),
        ),
        "prepared set": Target(files="prepared/*", read=_prepared),
        "token cache": Target(files="cache/*", read=_cache),
    }


def store(folder: Path) -> None:
    """Writes one of everything."""
    checkpoints = _checkpoints(folder)
    for step in (2, 4):
        checkpoints.save(_state(step), step=step)
    checkpoints.save_best(_state(3).params, step=3, note={"value": 0.5})
    checkpoints.close()
    native.write_params(str(folder / "imported"), _state(5).params, config=to_config(DESCRIPTION))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(open_tokenizer(TOKENIZER).init, jax.random.key(0))
    drawn = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    save_params(folder / "tokenizer.safetensors", drawn, config=TOKENIZER)
    for number in range(4):
        path = folder / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)).save(path)
    prepare.prepare(
        prepare.PrepareConfig(
            source=f"folder:{folder}/images", output=str(folder / "prepared"), workers=1
        )
    )
    with _open_cache(folder) as cache:
        for step in range(2):
            cache.write(step, images=IMAGES + np.uint8(step), ids=np.full((2, 4), step, np.uint16))


def flip(folder: Path, pattern: str, chance: random.Random) -> str:
    """Flips a bit of one of the files that match; returns which one, in words."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file() and path.stat().st_size)
    by_size = chance.random() < 0.5
    (path,) = chance.choices(files, [path.stat().st_size if by_size else 1 for path in files])
    content = bytearray(path.read_bytes())
    # ArrayRecord fills up to 64 kB with zeros, which nothing reads.
    places = [place for place, value in enumerate(content) if value] or range(len(content))
    place, bit = chance.choice(places), chance.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.relative_to(folder)}, byte {place}, bit {bit}"


def outcome_of(target: Target, folder: Path, expected: Any) -> str:
    """ "noticed", "harmless", or what else came of it."""
    try:
        found = target.read(folder)
    except Noticed:
        return "noticed"
    except NOTICED as error:
        return f"more than one line: {error}" if "\n" in str(error) else "noticed"
    except Exception as error:
        return f"traceback: {type(error).__name__} {str(error)[:200]!r}"
    return "harmless" if same(found, expected) else "other numbers: without a word"


def same(found: Any, expected: Any) -> bool:
    """Whether all arrays and values are equal, bit for bit."""
    ours, theirs = jax.tree.flatten(found), jax.tree.flatten(expected)
    return ours[1] == theirs[1] and all(
        np.asarray(a).dtype == np.asarray(b).dtype
        and np.asarray(a).shape == np.asarray(b).shape
        and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(ours[0], theirs[0], strict=True)
    )


def _copied(whole: Path, folder: Path) -> Path:
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("images"))
    return copy


def _read_copy(target: Target, whole: Path, folder: Path) -> Any:
    return target.read(_copied(whole, folder))


@functools.cache
def _shapes() -> tuple[Task, TrainState]:
    params = unflatten(random_params(DESCRIPTION))
    task = Task(
        init=lambda key: jax.tree.map(jax.numpy.asarray, params),
        prepare=None,
        loss=None,
        evaluate=None,
        metrics=None,
        frozen={},
        flops_per_image=0.0,
    )
    optimizer = optim.adamw(OptimizerConfig(learning_rate=1e-3, warmup_steps=0))
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])
    shapes = state_shapes(task, optimizer, mesh)
    placements = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    make = jax.jit(lambda key: init_state(task, optimizer, key), out_shardings=placements)
    return shapes, make(jax.random.key(0))


def _state(step: int) -> TrainState:
    """Other numbers for every step, moments included."""
    _, state = _shapes()
    return jax.tree.map(lambda leaf: leaf + np.asarray(step).astype(leaf.dtype), state)


def _checkpoints(folder: Path) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(str(folder / "run"), run=RUN, config=to_config(DESCRIPTION))


def _resume(folder: Path) -> TrainState:
    checkpoints = _checkpoints(folder)
    try:
        restored = checkpoints.restore(_shapes()[0])
    finally:
        checkpoints.close()
    if (folder / "run" / "unreadable_checkpoints").exists():
        if not same(restored, _state(2)):
            raise AssertionError("set aside, and the one before is not what it was")
        raise Noticed
    return restored


def _init_from(folder: Path) -> Any:
    return checkpoint.restore_params(str(folder / "run"), shapes=_shapes()[0].params)


def _export(folder: Path) -> Any:
    output = folder / "exported.safetensors"
    weights.export_checkpoint(str(folder / "run"), format="timm", output=str(output))
    return safetensors.numpy.load_file(output)


def _best(folder: Path) -> Any:
    checkpoints = _checkpoints(folder)
    try:
        note = checkpoints.best()
    finally:
        checkpoints.close()
    if note is None:
        if not (folder / "run" / "unreadable_checkpoints").exists():
            raise AssertionError("the best parameters are gone")
        raise Noticed
    source = str(folder / "run" / "best")
    return note, checkpoint.restore_params(source, shapes=_shapes()[0].params)


def _imported(folder: Path) -> Any:
    source = str(folder / "imported")
    return native.saved_config(source), flatten(native.read_params(source))


def _prepared(folder: Path) -> Any:
    opened = prepared.open_set(str(folder / "prepared"), setting="config.data.source")
    images = []
    for index in range(opened.size):
        try:
            images.append(opened.read(index))
        except RuntimeError:  # counts as a bad image: tests/data/prepare_test.py
            images.append(None)
    if None in images:
        whole = prepared.open_set(str(folder.parent / "whole" / "prepared"), setting="whole")
        if any(image not in (None, whole.read(index)) for index, image in enumerate(images)):
            raise AssertionError("another image was read")
        raise Noticed
    return images, opened.labels, opened.classes


def _open_cache(folder: Path) -> contextlib.AbstractContextManager[token_cache.TokenCache]:
    facts = {"seed": 1, "data": {"source": "embedded"}}
    return token_cache.open_cache(str(folder / "cache"), facts=facts, rows=2, images=2, tokens=4)


def _cache(folder: Path) -> Any:
    with _open_cache(folder) as cache:
        rows = [cache.read(step, images=IMAGES + np.uint8(step)) for step in range(2)]
    for step, ids in enumerate(rows):
        if ids is not None and (ids != step).any():
            raise AssertionError("other ids were read")
    if any(ids is None for ids in rows):
        raise Noticed
    return rows


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Every damage is an error in the log, which is what should be there."""
    logger = absl_logging.get_absl_logger()
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
