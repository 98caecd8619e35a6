"""Images are matched with their maps by name, and what does not fit is named."""

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from beit_jax.config import ConfigError, DataConfig, SegmentDataConfig
from beit_jax.data import label_maps, pipeline, sources, views
from beit_jax.data.bad_images import BadImages

SIDE = 32


def _image(path: Path, *, height: int = 20, width: int = 30, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), (250, 10, 10)).save(path, exif=exif)


def _map(
    path: Path, labels: np.ndarray | None = None, *, height: int = 20, width: int = 30
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if labels is None:
        labels = np.arange(height * width).reshape(height, width) % 5
    Image.fromarray(labels.astype(np.uint8)).save(path)


def _open(text: str, *, training: bool = True, **settings) -> sources.Source:
    config = SegmentDataConfig(source=f"pairs:{text}", image_size=SIDE, **settings)
    return sources.open_source(config, training=training)


def _names(source: sources.Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("b.jpg", "a/x.png", "a/deep/er/y.v2.jpeg"):
        _image(tmp_path / "images" / name)
        _map((tmp_path / "labels" / name).with_suffix(".png"))
    return tmp_path


def test_images_are_matched_with_maps_at_any_depth(folder):
    (folder / "images/.hidden.jpg").touch()
    (folder / "labels/notes.txt").touch()
    source = _open(str(folder))
    assert _names(source) == ["a/deep/er/y.v2.jpeg", "a/x.png", "b.jpg"]
    assert source.fields == ("image", "segmentation")
    assert source.segmentation_classes == ()
    loaded = source.load(tf.constant(0, tf.int64))
    assert loaded["image"].shape == (20, 30, 3)
    np.testing.assert_array_equal(
        loaded["segmentation"], np.arange(600).reshape(20, 30) % 5, strict=False
    )


def test_each_image_gets_its_own_map(tmp_path):
    for number, name in enumerate("cab"):
        _image(tmp_path / f"images/{name}.jpg")
        _map(tmp_path / f"annotations/{name}.PNG", np.full((20, 30), number))
    source = _open(str(tmp_path))
    found = {
        source.name(index): int(source.load(tf.constant(index, tf.int64))["segmentation"][0, 0])
        for index in range(3)
    }
    assert found == {"c.jpg": 0, "a.jpg": 1, "b.jpg": 2}


def test_two_folders_may_have_any_names(folder):
    (folder / "images").rename(folder / "left, right")
    both = f"{folder}/left, right,{folder}/labels"
    assert len(_open(both)) == 3
    (folder / "labels/classes.txt").write_text("road\ncar\n")
    assert _open(both).segmentation_classes == ("road", "car")


def test_images_and_maps_may_lie_in_one_folder(tmp_path):
    for name in ("a", "deep/b"):
        _image(tmp_path / f"{name}.jpg")
        _map(tmp_path / f"{name}.png")
    assert _names(_open(f"{tmp_path},{tmp_path}/")) == ["a.jpg", "deep/b.jpg"]


def test_classes_have_the_names_of_a_file(folder):
    (folder / "classes.txt").write_bytes("\ufeffsky\r\nflower pot\r\nCafé\r\n\r\n".encode())
    assert _open(str(folder)).segmentation_classes == ("sky", "flower pot", "Café")


@pytest.mark.parametrize("content", [b"sky\n\nroad", b"\xff\xfe", b"a\n" * 256, b"a\x1b[31m"])
def test_a_file_that_names_no_classes_is_refused(folder, content):
    (folder / "classes.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.data\.source: .*classes\.txt"):
        _open(str(folder))


def test_held_out_images_take_their_maps_along(folder):
    training, held_out = (
        _open(str(folder), holdout=1),
        _open(str(folder), holdout=1, training=False),
    )
    assert sorted(_names(training) + _names(held_out)) == _names(_open(str(folder)))
    assert len(held_out) == 1


def test_other_jobs_read_no_maps(folder):
    source = sources.open_source(DataConfig(source=f"pairs:{folder}"), training=True)
    assert source.fields == ("image",)
    assert "segmentation" not in source.load(tf.constant(0, tf.int64))


def test_an_object_store_is_listed_too(folder, monkeypatch):
    """As `sources_test.py` does it: folders with a slash at the end."""
    isdir, exists = tf.io.gfile.isdir, tf.io.gfile.exists

    def real(path: str) -> str:
        return path.replace("gs://bucket", str(folder))

    def listdir(path: str) -> list[str]:
        return [entry.name + "/" * entry.is_dir() for entry in Path(real(path)).iterdir()]

    monkeypatch.setattr(tf.io.gfile, "listdir", listdir)
    monkeypatch.setattr(tf.io.gfile, "isdir", lambda path: isdir(real(path)))
    monkeypatch.setattr(tf.io.gfile, "exists", lambda path: exists(real(path)))
    assert _names(_open("gs://bucket")) == _names(_open(str(folder)))


# ---------------------------------------------------------------------------- what does not fit


def _refused(text: str) -> str:
    with pytest.raises(ConfigError, match=r"^config\.data\.source: ") as error:
        _open(text)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_without_a_partner_is_named(folder):
    for number in range(7):
        _image(folder / f"images/lone{number}.jpg")
    _map(folder / "labels/a/odd\n.png")
    message = _refused(str(folder))
    assert "7 of 10 images and 1 of 4 label maps" in message
    assert "lone0.jpg, lone1.jpg, lone2.jpg, lone3.jpg, lone4.jpg, ..." in message
    assert r"a/odd\n.png" in message


def test_two_images_of_one_name_are_named(folder):
    _image(folder / "images/b.png")
    assert "b.jpg and b.png" in _refused(str(folder))
    (folder / "images/b.png").unlink()
    _map(folder / "labels/b.PNG")
    assert "b.PNG and b.png" in _refused(str(folder))


def test_missing_and_empty_folders_are_named(folder, tmp_path):
    assert "'/no/such/place'" in _refused("/no/such/place")
    message = _refused(f"{folder}/images,{folder}/no such")
    assert "no such'" in message
    assert "/images'" not in message
    assert "labels, annotations" in _refused(f"{folder}/labels")
    (folder / "annotations").mkdir()
    assert "labels, annotations" in _refused(str(folder))
    assert "no .png files" in _refused(f"{folder}/images,{folder}/annotations")
    assert "no images" in _refused(f"{folder}/annotations,{folder}/labels")


def test_maps_of_colours_are_refused_before_a_run(folder):
    Image.new("RGB", (30, 20)).save(folder / "labels/a/x.png")
    config = SegmentDataConfig(source=f"pairs:{folder}")
    source = sources.open_source(config, training=True)
    with pytest.raises(ConfigError, match=re.escape("the map of a/x.png has RGB colours")):
        label_maps.check_labels(source, config=config, classes=5)


@pytest.mark.slow
def test_what_does_not_fit_is_a_bad_image(tmp_path, caplog):
    """A wrong size, a label without a class, damage: replaced, counted, named; ignored if grey."""
    for name in ("good", "rotated", "size", "label", "damaged"):
        _image(tmp_path / f"images/{name}.jpg")
        _map(tmp_path / f"labels/{name}.png")
    _image(tmp_path / "images/rotated.jpg", height=30, width=20, orientation=6)
    _map(tmp_path / "labels/size.png", height=21)
    _map(tmp_path / "labels/label.png", np.full((20, 30), 5))
    (tmp_path / "labels/damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    config = SegmentDataConfig(
        source=f"pairs:{tmp_path}", image_size=SIDE, workers=1, max_bad_share=1.0
    )
    source = sources.open_source(config, training=True)
    made = views.segmentation_views(config, classes=5)

    bad = BadImages(source, max_share=1.0, evaluation=True)
    shapes = {}
    for batch in pipeline.eval_batches(source, config=config, views=made, batch_size=1):
        bad.count(batch)
        name = source.name(int(batch["index"][0])).removesuffix(".jpg")
        assert batch["replaced"] == (name not in ("good", "rotated"))
        shapes[name] = batch["image"].shape
        assert batch["segmentation"].shape == batch["image"].shape[:3]
        # Whatever stands for a bad image, good pixels of another or grey, its map fits it.
        if batch["replaced"] and (batch["image"] == 128).all():
            assert (batch["segmentation"] == 255).all()
        else:
            assert set(np.unique(batch["segmentation"])) <= set(range(5))
    assert shapes["good"] == shapes["rotated"] == (1, 20, 30, 3)
    assert bad.bad == 3
    assert "size.jpg" in caplog.text

    batch = next(pipeline.training_batches(source, config=config, views=made, seed=0, batch_size=5))
    names = [source.name(index) for index in batch["index"].tolist()]
    assert {name: bool(flag) for name, flag in zip(names, batch["replaced"], strict=True)} == {
        "good.jpg": False,
        "rotated.jpg": False,
        "size.jpg": True,
        "label.jpg": True,
        "damaged.jpg": True,
    }


def test_a_grey_image_is_ignored_all_over(tmp_path):
    """It stands where nothing else can be read, in batches of maps whose sizes nothing tells."""
    _image(tmp_path / "images/a.jpg")
    _map(tmp_path / "labels/a.png", np.full((20, 30), 9))
    config = SegmentDataConfig(source=f"pairs:{tmp_path}", image_size=SIDE, workers=1)
    source = sources.open_source(config, training=True)
    made = views.segmentation_views(config, classes=5)
    (batch,) = pipeline.eval_batches(source, config=config, views=made, batch_size=1)
    assert batch["replaced"].all()
    assert (batch["segmentation"] == 255).all()
    assert (batch["image"] == 128).all()
