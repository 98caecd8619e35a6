"""Ids that are kept are the ids that would be named: rows, files, hosts, and whole runs."""

import dataclasses
import functools
import itertools
import json
import logging
import os

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from beit_jax import jobs
from beit_jax.config import ConfigError, DataConfig, MaskConfig, RunConfig
from beit_jax.storage import StorageError
from beit_jax.tasks import feed, pretrain, token_cache, token_feed
from beit_jax.tokenizers.loading import load_params, open_tokenizer
from beit_jax.training import loop, metrics
from tests.tasks import tiny

IMAGES, TOKENS, ROWS = 4, 9, 5
FACTS = {"seed": 0}
opened = functools.partial(
    token_cache.open_cache, facts=FACTS, rows=ROWS, images=IMAGES, tokens=TOKENS
)


def a_batch(step):
    rng = np.random.default_rng(step)
    return {
        "images": rng.integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8),
        "ids": rng.integers(0, 1 << 16, (IMAGES, TOKENS), dtype=np.uint16),
    }


def fill(cache, steps=range(ROWS)):
    for step in steps:
        cache.write(step, **a_batch(step))


def known(cache, step):
    """Whether a step's ids are known; they are what was written then."""
    batch = a_batch(step % ROWS)
    ids = cache.read(step, images=batch["images"])
    if ids is None:
        return False
    assert ids.dtype == np.uint16
    np.testing.assert_array_equal(ids, batch["ids"])
    return True


def test_rows_come_back_a_cycle_later(tmp_path):
    with opened(str(tmp_path)) as cache:
        fill(cache, range(3))
        assert [known(cache, step) for step in range(ROWS)] == [True] * 3 + [False] * 2
    with opened(str(tmp_path)) as cache:
        fill(cache, [3])
        assert [known(cache, 7 * ROWS + row) for row in range(ROWS)] == [True] * 4 + [False]


@pytest.mark.parametrize("position", [0, 5, 8, 30, -1])
def test_a_damaged_row_is_rejected_and_reported(tmp_path, caplog, position):
    """A flipped bit in the mark, the checksum, a fingerprint or an id."""
    with opened(str(tmp_path)) as cache:
        fill(cache)
        path = tmp_path / "00000-of-00001.tokens"
        content = bytearray(path.read_bytes())
        size = len(content) // ROWS
        content[2 * size + position % size] ^= 4
        path.write_bytes(content)
        with caplog.at_level(logging.WARNING):
            assert [known(cache, row) for row in range(ROWS)] == [True, True, False, True, True]
        assert "row 2 is damaged" in caplog.text
        fill(cache, [2])
        assert all(known(cache, row) for row in range(ROWS))


def test_a_row_at_another_position_is_rejected(tmp_path):
    with opened(str(tmp_path)) as cache:
        fill(cache)
        path = tmp_path / "00000-of-00001.tokens"
        content = path.read_bytes()
        size = len(content) // ROWS
        path.write_bytes(content[size : 2 * size] + content[size:])
        assert cache.read(0, images=a_batch(1)["images"]) is None
        assert known(cache, 1)


def test_ids_of_other_images_are_not_taken(tmp_path, caplog):
    with opened(str(tmp_path)) as cache:
        fill(cache)
        images = a_batch(1)["images"]
        images[3] = 128  # could not be read this time
        assert cache.read(1, images=images) is None
        assert "of row 1, 1 of 4 images" in caplog.text


@pytest.mark.parametrize(
    "change", [{"facts": {"seed": 1}}, {"rows": ROWS + 1}, {"tokens": TOKENS + 1}], ids=str
)
def test_a_foreign_file_is_started_anew(tmp_path, caplog, change):
    with opened(str(tmp_path)) as cache:
        fill(cache)
    with opened(str(tmp_path), **change) as cache:
        images = a_batch(0)["images"]
        assert cache.read(0, images=images) is None
    assert f"STARTED ANEW; different: {next(iter(change.get('facts', change)))}" in caplog.text
    with opened(str(tmp_path)) as cache:  # and back: its rows are gone
        assert not any(known(cache, row) for row in range(ROWS))


def test_a_file_without_its_record_or_of_another_size_is_started_anew(tmp_path):
    with opened(str(tmp_path)) as cache:
        fill(cache)
    path = tmp_path / "00000-of-00001.tokens"
    path.write_bytes(path.read_bytes()[:-1])
    with opened(str(tmp_path)) as cache:
        assert not known(cache, 0)
        fill(cache)
    (tmp_path / "00000-of-00001.json").write_text("{")
    with opened(str(tmp_path)) as cache:
        assert not known(cache, 0)
        fill(cache)
    with opened(str(tmp_path)) as cache:
        assert known(cache, 0)


@pytest.mark.parametrize("suffix", ["tokens", "json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_refused(tmp_path, suffix, make):
    make(tmp_path / f"00000-of-00001.{suffix}")
    with (
        pytest.raises(ConfigError, match=r"^config\.data\.token_cache: .*\Z"),
        opened(str(tmp_path)),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("00000-of-00001.tokens", b"somebody's tokens"),
        ("00000-of-00001.json", b'{"shard": 0}'),
        ("00000-of-00001.json", b"not JSON"),
    ],
)
def test_a_file_of_somebody_else_is_refused_and_kept(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused = pytest.raises(ConfigError, match=f"config.data.token_cache: .*{name} is no file")
    with refused, opened(str(tmp_path)):
        pass
    assert (tmp_path / name).read_bytes() == content


def test_a_file_whose_writing_was_cut_off_before_its_record_is_started_anew(tmp_path):
    """Killed between the two: the file is all zeros, or has rows and half a record."""
    with opened(str(tmp_path)) as cache:
        fill(cache, [3])
    (tmp_path / "00000-of-00001.json").unlink()
    with opened(str(tmp_path)) as cache:
        assert not known(cache, 3)
        fill(cache)
    (tmp_path / "00000-of-00001.json").unlink()
    with opened(str(tmp_path)) as cache:
        assert not known(cache, 0)


def test_two_runs_cannot_share_a_file(tmp_path):
    with (
        opened(str(tmp_path)),
        pytest.raises(ConfigError, match="another run"),
        opened(str(tmp_path)),
    ):
        pass
    with opened(str(tmp_path)), opened(str(tmp_path), shard=1, shards=2):
        pass


def test_a_disk_that_fails_costs_rows_not_the_run(tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    with opened(str(tmp_path)) as cache:
        monkeypatch.setattr(token_cache.os, "pwrite", full)
        fill(cache)
        assert caplog.text.count("No space left") == 1
        assert not known(cache, 0)
        monkeypatch.undo()
        fill(cache)
        assert known(cache, 0)
        monkeypatch.setattr(token_cache.os, "pread", full)
        assert not known(cache, 0)


def test_half_a_row_is_a_failure_too(tmp_path, monkeypatch, caplog):
    """A disk that becomes full in a row takes its beginning without an error."""
    pwrite = os.pwrite
    with opened(str(tmp_path)) as cache:
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:9], at))
        fill(cache)
        assert caplog.text.count("No space left") == 1


def test_a_full_disk_is_not_a_wrong_setting(tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.pathlib.Path, "touch", full)
    with pytest.raises(StorageError, match=r"\.tokens: the disk is full"), opened(str(tmp_path)):
        pass


def test_a_folder_is_needed_where_the_workdir_is_not_local():
    data = DataConfig(source="embedded", augmentation_cycle=2)
    assert token_cache.folder(data, workdir="/runs/a") == "/runs/a/token_cache"
    with pytest.raises(ConfigError, match=r"config\.data\.token_cache: .*gs://runs/a"):
        token_cache.folder(data, workdir="gs://runs/a")
    elsewhere = dataclasses.replace(data, token_cache="/disk")
    assert token_cache.folder(elsewhere, workdir="gs://runs/a") == "/disk"
    off = dataclasses.replace(data, augmentation_cycle=0)
    assert token_cache.folder(off, workdir="gs://runs/a") == ""


# ---------------------------------------------------------------------------- hosts

DATA = DataConfig(
    source="embedded:20",
    holdout=1,
    image_size=32,
    token_image_size=16,
    workers=2,
    augmentation_cycle=2,
    mask=MaskConfig(count=6, min_block=2),
)


def host(folder, *, shard, shards, take, monkeypatch, count=None):
    """Batches of one host, with a tokenizer that takes two bytes of each corner for ids."""
    monkeypatch.setattr(jax, "process_index", lambda: shard)
    monkeypatch.setattr(jax, "process_count", lambda: shards)
    monkeypatch.setattr(loop.cluster, "check_agreement", lambda *args: None)
    read = functools.partial(feed.image_feed, DATA, run=RunConfig(steps=9, batch_size=8), grid=4)
    named = []

    def encode(batch):
        images = batch["token_image"]
        named.append(len(images))
        return images[:, ::8, ::8, 0].reshape(-1, 4).astype(np.uint16)

    cache = token_cache.open_cache(
        str(folder), facts=FACTS, rows=4, images=8 // shards, tokens=4, shard=shard, shards=shards
    )
    with cache as rows:
        made = token_feed.known_tokens(
            read(keys=("image", "token_image", "mask")),
            lean=read(keys=("image", "mask")),
            cache=rows,
            encode=encode,
        )
        batches = list(itertools.islice(made.training(0), take))
        return batches, sum(named), made.metrics()


@pytest.mark.slow
def test_hosts_keep_their_own_rows(tmp_path, monkeypatch):
    """20 images, batches of 8, two steps an epoch, cycles of two epochs: 4 rows."""
    alone, named, numbers = host(
        tmp_path / "alone", shard=0, shards=1, take=10, monkeypatch=monkeypatch
    )
    assert named == 4 * 8
    assert numbers["tokenized_images"] == 4 * 8
    assert numbers["images_with_known_tokens"] >= 6 * 8
    parts = [
        host(tmp_path / "two", shard=shard, shards=2, take=10, monkeypatch=monkeypatch)
        for shard in (0, 1)
    ]
    assert [part[1] for part in parts] == [4 * 4, 4 * 4]
    for whole, *halves in zip(alone, *(part[0] for part in parts), strict=True):
        assert whole.keys() == {"image", "mask", "token_ids"}
        for name, values in whole.items():
            np.testing.assert_array_equal(values, np.concatenate([half[name] for half in halves]))
    for first, later in zip(alone[:4], alone[4:8], strict=True):
        np.testing.assert_array_equal(first["image"], later["image"])
        np.testing.assert_array_equal(first["token_ids"], later["token_ids"])
        assert (first["mask"] != later["mask"]).any()


@pytest.mark.slow
def test_ids_of_this_hosts_devices():
    assert jax.local_device_count() == 8
    config = jobs.parse_job(tiny.pretrain().to_dict()).tokenizer
    tokenizer, params = open_tokenizer(config), load_params(config)
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    encode = token_feed.local_encoder(tokenizer, tokenizer.encoding_params(params))
    ids = encode({"token_image": images, "mask": None})
    assert (ids.shape, ids.dtype) == ((16, 16), np.uint16)
    expected = jax.jit(tokenizer.encode)(params, images)
    assert len(np.unique(expected)) > 3
    np.testing.assert_array_equal(ids, expected.reshape(16, 16))
    # Jitter that is left to the device: of the tokenizer's view too.
    order = np.tile(np.arange(3, dtype=np.int32), (16, 1))
    factors = np.full((16, 3), [0.5, 1, 1], np.float32)
    ids = encode({"token_image": images, "factors": factors, "order": order})
    expected = jax.jit(tokenizer.encode)(params, images // 2)
    np.testing.assert_array_equal(ids, expected.reshape(16, 16))


def test_where_the_lean_view_differs_both_are_made(tmp_path, caplog):
    """No ping-pong between two pipelines, and the right ids."""
    starts = []

    def training(start_step, *, name, offset):
        starts.append(name)
        for step in itertools.count(start_step):
            image = np.full((IMAGES, 32, 32, 3), step % ROWS + offset, np.uint8)
            yield {"image": image} | ({"token_image": image} if name == "full" else {})

    def made(name, offset):
        return loop.Feed(
            training=functools.partial(training, name=name, offset=offset),
            evaluation=list,
            metrics=lambda: {"replaced_images": 1.0},
        )

    with opened(str(tmp_path)) as cache:
        named = token_feed.known_tokens(
            made("full", 0),
            lean=made("lean", 9),
            cache=cache,
            encode=lambda batch: np.repeat(batch["token_image"][:, :1, 0, 0], TOKENS, 1).astype(
                np.uint16
            ),
        )
        batches = list(itertools.islice(named.training(0), 4 * ROWS))
        numbers = named.metrics()
    assert starts == ["full", "lean", "full"]
    assert [batch["token_ids"][0, 0] for batch in batches] == 4 * list(range(ROWS))
    assert "both are made for every batch" in caplog.text
    assert numbers["tokenized_images"] == ROWS * IMAGES
    assert numbers["replaced_images"] == 2.0


# ---------------------------------------------------------------------------- runs


def losses(workdir):
    lines = metrics.read(f"{workdir}/metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def train(workdir, **settings):
    """20 steps of the tiny job: 32 images, 4 steps an epoch, cycles of 2 epochs."""
    values = tiny.pretrain()
    values.data.source = "embedded:32"
    values.run.steps = 20
    values.data.augmentation_cycle = 2
    values.update_from_flattened_dict(settings)
    config = jobs.parse_job(values.to_dict())
    pretrain.run(config, workdir=str(workdir))
    lines = metrics.read(f"{workdir}/metrics.jsonl")
    return losses(workdir), [line for line in lines if "tokenized_images" in line][-1:]


def set_in_jax(settings):
    """Sets JAX's settings and lets go of the folder that is in use."""
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Keeps compiled programs from one run to the next: five runs here have the same."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    set_in_jax(settings)
    yield
    set_in_jax(before)


@pytest.fixture(scope="module")
def straight(compiled_once, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, *train(workdir)


@pytest.mark.slow
def test_each_view_is_named_once(straight):
    workdir, curve, (numbers,) = straight
    assert list(curve) == list(range(1, 21))
    assert numbers["tokenized_images"] == 8 * 8
    assert (workdir / "first_batch.png").exists()
    facts = json.loads((workdir / "token_cache/00000-of-00001.json").read_text())
    assert (facts["rows"], facts["images"], facts["tokens"]) == (8, 8, 16)
    assert facts["tokenizer"]["dtype"] == "float32"


@pytest.mark.slow
def test_the_loss_curve_equals_that_of_tokenising_every_step(straight, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache.TokenCache, "read", lambda *args, **settings: None)
    curve, (numbers,) = train(tmp_path)
    assert numbers["tokenized_images"] >= 20 * 8
    assert curve == straight[1]


@pytest.mark.slow
def test_the_first_cycle_is_that_of_a_run_without(straight, tmp_path):
    """Epochs are whole batches here, so the views are the same; the tokens of masked patches are
    named inside the train step there, of all patches by a program of their own here."""
    curve, _ = train(tmp_path, **{"data.augmentation_cycle": 0})
    rows = 8
    assert list(curve.items())[:rows] == list(straight[1].items())[:rows]
    assert not any(curve[step] == straight[1][step] for step in range(rows + 1, 21))
    assert not (tmp_path / "token_cache").exists()


@pytest.mark.slow
def test_a_run_that_dies_resumes_to_the_same_curve(straight, tmp_path, monkeypatch, caplog):
    """It dies while tokens are being named, and one row is damaged meanwhile."""

    class Killed(BaseException):
        pass

    read = token_cache.TokenCache.read

    def read_or_die(self, step, **settings):
        if step == 6:
            raise Killed
        return read(self, step, **settings)

    monkeypatch.setattr(token_cache.TokenCache, "read", read_or_die)
    with pytest.raises(Killed):
        train(tmp_path, **{"run.checkpoint_every": 3})
    monkeypatch.setattr(token_cache.TokenCache, "read", read)
    path = tmp_path / "token_cache/00000-of-00001.tokens"
    content = bytearray(path.read_bytes())
    content[len(content) // 8 + 40] ^= 1
    path.write_bytes(content)
    curve, _ = train(tmp_path, **{"run.checkpoint_every": 3})
    assert curve == straight[1]
    assert caplog.text.count("row 1 is damaged") == 1


def test_too_many_tokens_for_two_bytes():
    values = tiny.pretrain()
    values.data.augmentation_cycle = 1
    values.tokenizer.vocabulary = (1 << 16) + 1
    with pytest.raises(ConfigError, match=r"config\.data\.augmentation_cycle: .*65537"):
        jobs.parse_job(values.to_dict())


@pytest.mark.slow
def test_facts_change_with_what_ids_depend_on():
    values = tiny.pretrain()
    config = jobs.parse_job(values.to_dict())
    params = open_tokenizer(config.tokenizer).encoding_params(load_params(config.tokenizer))

    def facts(*, data=config.data, seed=0, tokenizer=config.tokenizer, params=params):
        return token_cache.cache_facts(
            data,
            run=dataclasses.replace(config.run, seed=seed),
            tokenizer=tokenizer,
            params=params,
            source=feed.image_sources(data)[0],
        )

    base = facts()
    assert json.loads(json.dumps(base)) == base
    for name, value in (("workers", 1), ("prefetch", 1), ("mask", MaskConfig(count=3))):
        assert facts(data=dataclasses.replace(config.data, **{name: value})) == base
    augment = dataclasses.replace(config.data.augment, flip=False)
    assert facts(data=dataclasses.replace(config.data, augment=augment)) != base
    assert facts(data=dataclasses.replace(config.data, source="embedded:63")) != base
    assert facts(seed=1) != base
    assert facts(tokenizer=dataclasses.replace(config.tokenizer, dtype="bfloat16")) != base
    changed = jax.tree.map(lambda leaf: leaf + (leaf.ndim == 4), params)
    assert facts(params=changed)["weights"] != base["weights"]
