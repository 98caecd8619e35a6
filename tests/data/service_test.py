"""Services give the batches that the host itself would make, in order, or the run ends."""

import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from beit_jax.config import ConfigError, DataConfig, MaskConfig, RunError, SegmentDataConfig
from beit_jax.data import pipeline, service, sources, views

GRID = 4


@pytest.fixture(scope="module")
def services():
    """Two services in this process."""
    return [service.serve() for _ in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten images, one of them broken."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(10):
        pixels = rng.integers(0, 256, (6, 7, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((70, 60)).save(root / f"{number}.jpg")
    (root / "5.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    return root


def _read(folder, *, addresses=(), start_step=0, count=6, shard=0, shards=1, cycle=0):
    config = DataConfig(
        source=f"folder:{folder}",
        eval_source=f"folder:{folder}",
        image_size=32,
        token_image_size=16,
        mask=MaskConfig(count=6, min_block=2),
        workers=2,
        service=tuple(addresses),
    )
    batches = pipeline.training_batches(
        sources.open_source(config, training=True),
        config=config,
        views=views.pretraining_views(config, grid=GRID, keys=("image", "mask")),
        seed=3,
        batch_size=4,
        start_step=start_step,
        shard=shard,
        shards=shards,
        cycle=cycle,
    )
    return list(itertools.islice(batches, count))


def _read_maps(folder, *, addresses=()):
    config = SegmentDataConfig(
        source=f"pairs:{folder}", image_size=64, workers=2, service=addresses
    )
    return next(
        pipeline.training_batches(
            sources.open_source(config, training=True),
            config=config,
            views=views.segmentation_views(config, classes=4),
            seed=3,
            batch_size=4,
        )
    )


def _same(actual, expected):
    for mine, other in zip(actual, expected, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], other[name], err_msg=name)


@pytest.mark.slow
def test_the_same_batches_with_services(folder, services):
    """From the start and resumed, with one and two services, on two hosts; with replaced images."""
    addresses = [server.address for server in services]
    alone = _read(folder)
    assert any(batch["replaced"].any() for batch in alone)
    _same(_read(folder, addresses=addresses), alone)
    _same(_read(folder, addresses=addresses, start_step=3, count=3), alone[3:])
    _same(_read(folder, addresses=addresses[:1], count=3), alone[:3])
    halves = [_read(folder, addresses=addresses, shard=i, shards=2, count=3) for i in (0, 1)]
    for whole, *parts in zip(alone[:3], *halves, strict=True):
        for name, values in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)


@pytest.mark.slow
def test_a_service_decodes_every_format(tmp_path):
    """A process of its own, which is sent the pipeline: Pillow decodes there as it does here."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    for folder in ("photos", "images", "labels"):
        (tmp_path / folder).mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "photos" / "0.png")
    photo.save(tmp_path / "photos" / "1.png", exif=exif)
    photo.save(tmp_path / "photos" / "2.gif")
    photo.save(tmp_path / "photos" / "3.bmp")
    alone = _read(tmp_path / "photos", count=2)
    assert sorted(alone[0]["by_pillow"].tolist()) == [False, True, True, True]
    for number in range(4):
        photo.save(tmp_path / f"images/{number}.jpg")
        photo.quantize(4).save(tmp_path / f"labels/{number}.png")
    maps = _read_maps(tmp_path)
    assert set(range(4)) <= set(np.unique(maps["segmentation"]))
    assert not maps["replaced"].any()
    command = [sys.executable, "-m", "beit_jax.data.service", "--port=0", "--address=localhost"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = next(line for line in process.stderr if "config.data.service" in line)
            address = re.search(r"localhost:\d+", said).group()
            _same(_read(tmp_path / "photos", addresses=[address], count=2), alone)
            _same([_read_maps(tmp_path, addresses=(address,))], [maps])
        finally:
            process.kill()


def test_services_are_divided_between_hosts():
    addresses = tuple("abcdefg")
    for shards in (1, 2, 3, 7):
        used = [service.assigned(addresses, shard=i, shards=shards) for i in range(shards)]
        assert sorted(itertools.chain(*used)) == list(addresses)
    assert [service.assigned(("a", "b"), shard=i, shards=4) for i in range(4)] == [
        ("a",),
        ("b",),
        ("a",),
        ("b",),
    ]


def test_a_service_that_lost_its_position_ends_the_run():
    def numbers(*values):
        return iter([(np.int64(value), {}) for value in values])

    turns = [numbers(4, 4), numbers(5)]
    batches = service._in_turn(turns, addresses=("a:1", "b:1"), start_step=4)
    assert [next(batches), next(batches)] == [{}, {}]
    with pytest.raises(RunError, match=r"a:1 gave the batch of step 4 for step 6: .* same command"):
        next(batches)
    batches = service._in_turn([numbers()], addresses=("a:1",), start_step=0)
    with pytest.raises(RunError, match="a:1 gave no batch for step 0"):
        next(batches)


def test_errors_name_what_cannot_be_served(folder):
    with pytest.raises(ConfigError, match=r"config\.data\.service: no answer from 'localhost:1'"):
        _read(folder, addresses=["localhost:1"])
    config = DataConfig(source="embedded", workers=0, service=("localhost:1",))
    given = {"config": config, "views": None, "seed": 0, "batch_size": 2}
    given["views"] = pipeline.Views(training=lambda e, k: {}, evaluation=lambda e: {})
    source = sources.Source(size=4, name=str, load=lambda i: {"image": tf.zeros([], tf.uint8)})
    with pytest.raises(ConfigError, match=r"config\.data\.workers: say how many cores"):
        pipeline.training_batches(source, **given)
    source = sources.Source(size=4, name=str, load=source.load, portable=False)
    with pytest.raises(ConfigError, match="read by Python"):
        pipeline.training_batches(source, **given)
