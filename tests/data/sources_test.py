"""Sources: which images are found, and which of them are held out."""

import logging
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from beit_jax.config import ConfigError, DataConfig
from beit_jax.data import sources
from beit_jax.data.sources import embedded
from beit_jax.data.sources import folder as folder_source


def _write(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = (7 * number % 256, 100, 200)
        Image.new("RGB", (20, 10), colour).save(path, "PNG")


# ---------------------------------------------------------------------------- folder


def test_folder_finds_images_at_any_depth(tmp_path, caplog):
    _write(tmp_path, "b.JPG", "a/x.png", "a/deep/er/y.jpeg", "a.webp", "z.Gif", "c.bmp")
    _write(tmp_path, ".hidden.png", ".git/z.png", "notes.txt", "scan.tiff")
    with caplog.at_level(logging.INFO, logger="absl"):
        source = sources.open_source(DataConfig(source=f"folder:{tmp_path}"), training=True)
    names = [source.name(index) for index in range(len(source))]
    assert names == ["a.webp", "a/deep/er/y.jpeg", "a/x.png", "b.JPG", "c.bmp", "z.Gif"]
    assert "2 files" in caplog.text
    assert "scan.tiff" in caplog.text
    # The content tells the format: all of these are PNGs.
    for index in range(len(source)):
        image = source.load(tf.constant(index, tf.int64))["image"].numpy()
        np.testing.assert_array_equal(image, np.asarray(Image.open(tmp_path / names[index])))


def test_folder_follows_links_without_cycles(tmp_path):
    _write(tmp_path / "elsewhere", "linked.png")
    _write(tmp_path / "root", "a/plain.png")
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/a/up").symlink_to(tmp_path / "root")
    source = sources.open_source(DataConfig(source=f"folder:{tmp_path}/root"), training=True)
    assert [source.name(index) for index in range(len(source))] == [
        "a/plain.png",
        "link/linked.png",
    ]


def test_only_regular_files_are_images(tmp_path, caplog):
    """Opening a pipe waits for a writer, and /dev/zero has no end."""
    _write(tmp_path, "plain.png", "elsewhere/target.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "linked-pipe.jpg").symlink_to("pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "nothing.jpg").symlink_to("no-such-file")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.png").symlink_to("elsewhere/target.png")
    (tmp_path / "pipe").symlink_to("pipe.jpg")  # not named like an image: not worth a warning
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.open(".", os.O_RDONLY)
        try:
            os.chdir(tmp_path)  # a socket's path is at most a hundred bytes
            listener.bind("socket.jpg")
        finally:
            os.fchdir(before)
            os.close(before)
        with caplog.at_level(logging.WARNING, logger="absl"):
            source = sources.open_source(DataConfig(source=f"folder:{tmp_path}"), training=True)
    names = [source.name(index) for index in range(len(source))]
    assert names == ["elsewhere/target.png", "link.png", "plain.png"]
    assert "6 folders or files" in caplog.text
    assert "linked-pipe.jpg (not a regular file)" in caplog.text


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, caplog, monkeypatch):
    _write(tmp_path, "plain.png", "closed/hidden.png")
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(os.path.normpath(path)) == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # as root, everything may be read
    with caplog.at_level(logging.WARNING, logger="absl"):
        source = sources.open_source(DataConfig(source=f"folder:{tmp_path}"), training=True)
    assert [source.name(index) for index in range(len(source))] == ["plain.png"]
    assert "closed/ (Permission denied)" in caplog.text


def test_a_name_need_not_be_utf8(tmp_path):
    _write(tmp_path, "plain.png")
    try:
        (tmp_path / "plain.png").rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    source = sources.open_source(DataConfig(source=f"folder:{tmp_path}"), training=True)
    assert source.name(0) == r"caf\xe9.png"
    assert source.load(tf.constant(0, tf.int64))["image"].shape == (10, 20, 3)


def test_remote_listing_agrees_with_the_local_one(tmp_path, monkeypatch):
    _write(tmp_path, "b.jpg", "a/x.png", "a/deep/er/y.jpeg", ".hidden.png", ".git/z.png", "n.txt")
    local = sorted(folder_source._walk(str(tmp_path)))

    # Object stores list folders with a slash at the end.
    def listdir(path: str) -> list[str]:
        real = tmp_path / path.removeprefix("gs://bucket")[1:]
        return [drawn.name + "/" * drawn.is_dir() for drawn in real.iterdir()]

    monkeypatch.setattr(tf.io.gfile, "listdir", listdir)
    monkeypatch.setattr(tf.io.gfile, "isdir", lambda path: False)
    assert (
        sorted(folder_source._walk("gs://bucket/"))
        == local
        == [
            "a/deep/er/y.jpeg",
            "a/x.png",
            "b.jpg",
            "n.txt",
        ]
    )


def _names(config: DataConfig, *, training: bool) -> set[str]:
    source = sources.open_source(config, training=training)
    return {source.name(index) for index in range(len(source))}


def test_held_out_files_are_never_trained_on(tmp_path):
    _write(tmp_path, *(f"{number % 3}/{number}.png" for number in range(30)))
    config = DataConfig(source=f"folder:{tmp_path}", holdout=7)
    training, held_out = _names(config, training=True), _names(config, training=False)
    assert len(held_out) == 7
    assert len(training) == 23
    assert not training & held_out
    # They are a sample, not the first or last in order.
    assert held_out not in (set(sorted(training | held_out)[:7]), set(sorted(training)[-7:]))


def test_new_files_do_not_move_old_ones_into_training(tmp_path):
    _write(tmp_path, *(f"{number}.png" for number in range(40)))
    config = DataConfig(source=f"folder:{tmp_path}", holdout=10)
    before = _names(config, training=False)
    _write(tmp_path, "new.png")
    after = _names(config, training=False)
    assert len(before - after) <= 1  # at most one gives way to the new file


def test_eval_source_is_taken_whole(tmp_path):
    _write(tmp_path, "train/a.png", "train/b.png", "val/c.png")
    config = DataConfig(source=f"folder:{tmp_path}/train", eval_source=f"folder:{tmp_path}/val")
    assert _names(config, training=True) == {"a.png", "b.png"}
    assert _names(config, training=False) == {"c.png"}


@pytest.mark.parametrize(
    ("settings", "training", "message"),
    [
        ({"source": "folder:{}/no/such"}, True, "config.data.source: no such folder: .*no/such"),
        ({"source": "folder:"}, True, "config.data.source: no such folder"),
        ({"source": "folder:{}/empty"}, True, "config.data.source: no images in .*empty"),
        ({"source": "folder:{}/two", "holdout": 2}, True, "config.data.holdout: 2 of the 2 images"),
        ({"source": "folder:{}/two"}, False, "config.data.holdout: 0 leaves no images"),
        ({"source": "embedded"}, False, "config.data.holdout: 0 leaves no images"),
        ({"source": "embedded:many"}, True, "config.data.source: embedded:NUMBER"),
        ({"source": "embedded:0"}, True, "config.data.source: embedded:NUMBER"),
        ({"source": "imagenet"}, True, "config.data.source: must be embedded, "),
        (
            {"source": "embedded", "eval_source": "folder:{}/no"},
            False,
            "config.data.eval_source: no such folder",
        ),
        (
            {"source": "tfds:imagenet2012"},
            True,
            r"config.data.source: no prepared .*ILSVRC2012_img_val.tar.*downloads/manual",
        ),
        ({"source": "tfds:mnist", "holdout": 5}, True, "config.data.holdout: .*eval_split"),
    ],
)
def test_errors_name_the_setting(tmp_path, monkeypatch, settings, training, message):
    (tmp_path / "empty").mkdir()
    _write(tmp_path, "two/a.png", "two/b.png")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    settings = {
        name: value.format(tmp_path) if isinstance(value, str) else value
        for name, value in settings.items()
    }
    with pytest.raises(ConfigError, match=message) as error:
        sources.open_source(DataConfig(**settings), training=training)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------- further kinds


def test_a_kind_of_source_from_outside_is_one_row(monkeypatch):
    def open_plain(request: sources.Request) -> sources.Source:
        def load(index: tf.Tensor, *, window: sources.Window | None = None) -> sources.Element:
            return {"image": tf.fill([8, 8, 3], tf.cast(index, tf.uint8))}

        return sources.Source(
            size=int(request.value), name=lambda index: f"grey {index}", load=load
        )

    monkeypatch.setitem(sources.KINDS, "plain", sources.Kind("plain:NUMBER", open_plain))
    source = sources.open_source(DataConfig(source="plain:5"), training=True)
    assert len(source) == 5
    assert (source.load(tf.constant(3, tf.int64))["image"].numpy() == 3).all()
    with pytest.raises(ConfigError, match=r"tfds:NAME or plain:NUMBER; got 'grey:5'"):
        sources.open_source(DataConfig(source="grey:5"), training=True)


# ---------------------------------------------------------------------------- embedded


def _embedded(number: int, *, training: bool = True, start: int = 0, **settings) -> list[dict]:
    config = DataConfig(source="embedded", image_size=64, holdout=50, **settings)
    source = sources.open_source(config, training=training)
    indices = tf.data.Dataset.range(start, start + number)
    return list(indices.map(source.load).as_numpy_iterator())


def test_embedded_images_are_a_function_of_the_index():
    whole, part = _embedded(12), _embedded(4, start=8)
    for first, second in zip(whole[8:], part, strict=True):
        np.testing.assert_array_equal(first["image"], second["image"])
        np.testing.assert_array_equal(first["segmentation"], second["segmentation"])
    assert len({drawn["image"].tobytes() for drawn in whole}) == 12
    held_out = _embedded(12, training=False)
    assert not {drawn["image"].tobytes() for drawn in whole} & {
        drawn["image"].tobytes() for drawn in held_out
    }


def test_embedded_sizes():
    source = sources.open_source(DataConfig(source="embedded:123"), training=True)
    assert len(source) == 123
    config = DataConfig(source="embedded:123", holdout=9)
    assert len(sources.open_source(config, training=True)) == 123
    assert len(sources.open_source(config, training=False)) == 9


def test_embedded_segmentations_show_one_shape():
    images = _embedded(300)
    for drawn in images:
        assert drawn["image"].shape == (80, 80, 3)
        background, shape = np.unique(drawn["segmentation"])
        assert background == 0
        assert 1 <= shape <= len(embedded.SHAPES)
        assert 0.01 < (drawn["segmentation"] > 0).mean() < 0.6
    assert len({drawn["segmentation"].max() for drawn in images}) == len(embedded.SHAPES)


def test_embedded_classes_are_the_backgrounds_textures():
    """Gradients of stripes lie along one line; those of checks, dots and rings in all directions.

    The texture "gradient" also lies along one line and never changes its sign.
    """
    source = sources.open_source(DataConfig(source="embedded:1", image_size=64), training=True)
    assert source.classes == embedded.TEXTURES

    def coherence(drawn: dict) -> tuple[float, float]:
        image = drawn["image"].astype(float).mean(axis=2)
        # Differences over four pixels: a gradient changes by less than a level per pixel.
        rows = (image[4:] - image[:-4])[:, 2:-2]
        columns = (image[:, 4:] - image[:, :-4])[2:-2]
        windows = np.lib.stride_tricks.sliding_window_view(drawn["segmentation"], (5, 5))
        clear = windows.max(axis=(2, 3)) == 0  # no part of the shape nearby
        slopes = np.stack([rows[clear], columns[clear]])
        tensor = slopes @ slopes.T
        large, small = np.linalg.eigvalsh(tensor)[::-1]
        direction = np.linalg.eigh(tensor)[1][:, -1] @ slopes
        return (large - small) / (large + small), abs(direction.sum()) / np.abs(direction).sum()

    found = {name: [] for name in embedded.TEXTURES}
    for drawn in _embedded(300):
        found[embedded.TEXTURES[drawn["label"]]].append(coherence(drawn))
    assert all(len(values) > 25 for values in found.values())
    along, one_way = (
        {name: np.median([value[i] for value in values]) for name, values in found.items()}
        for i in (0, 1)
    )
    assert min(along["stripes"], along["gradient"]) > 0.9
    assert max(along[name] for name in ("checks", "dots", "waves")) < 0.8
    assert one_way["gradient"] > 0.9
    assert max(value for name, value in one_way.items() if name != "gradient") < 0.6


def test_embedded_shapes_look_like_their_names():
    """Area over squared extent separates full shapes from thin ones at any angle."""

    def fill(drawn: dict) -> float:
        y, x = np.nonzero(drawn["segmentation"])
        extent = np.hypot(np.ptp(x) + 1, np.ptp(y) + 1)
        return len(x) / extent**2

    fills = {name: [] for name in embedded.SHAPES}
    for drawn in _embedded(300):
        fills[embedded.SHAPES[drawn["segmentation"].max() - 1]].append(fill(drawn))
    mean = {name: np.mean(values) for name, values in fills.items()}
    assert mean["disc"] == pytest.approx(np.pi / 8, abs=0.02)
    assert mean["ring"] < 0.75 * mean["disc"]
    assert mean["frame"] < mean["square"]
    assert mean["crescent"] < mean["half disc"] < mean["disc"]


def test_embedded_hidden_patches_follow_from_their_neighbours():
    """An image's own colours predict a patch far better than the average over images does."""
    images = np.stack([drawn["image"] for drawn in _embedded(200)]).astype(float) / 255
    patches = images.reshape(200, 10, 8, 10, 8, 3).mean((2, 4))  # [image, row, column, rgb]
    around = (patches[:, :-2, 1:-1] + patches[:, 2:, 1:-1]) / 2
    around = (around + (patches[:, 1:-1, :-2] + patches[:, 1:-1, 2:]) / 2) / 2
    error = ((patches[:, 1:-1, 1:-1] - around) ** 2).mean()
    variance = patches.var((0, 1, 2)).mean()
    assert error < 0.35 * variance
    # And images are not uniform, so that there is something to predict.
    assert images.reshape(200, -1, 3).std(1).mean() > 0.1
