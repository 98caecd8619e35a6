"""Prepared sets hold the same images in the same order, and are complete or not there at all."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from beit_jax.config import ConfigError, DataConfig, RunError
from beit_jax.data import pipeline, prepare, sources
from beit_jax.data.bad_images import BadImages
from beit_jax.data.decode import decode_image
from beit_jax.data.pipeline import Views
from beit_jax.data.prepare import PrepareConfig

CLASSES = ("ape", "bee")


def _picture(number: int, *, height: int, width: int) -> Image.Image:
    """A smooth image, which JPEG changes little; different for every number."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x / width, 255 * y / height
    return Image.fromarray(
        np.stack([red, green, np.full_like(red, 9 * number)], -1).astype(np.uint8)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images in two classes (JPEG, PNG with alpha, GIF, grey) and two broken files."""
    root = tmp_path_factory.mktemp("pictures")
    kinds = (("JPEG", ".jpg"), ("PNG", ".png"), ("GIF", ".gif"), ("JPEG", ".jpeg"))
    for number in range(12):
        kind, extension = kinds[number % 4]
        path = root / CLASSES[number // 6] / f"{number:02}{extension}"
        path.parent.mkdir(exist_ok=True)
        image = _picture(number, height=40 + number, width=90 - number)
        options = {}
        if kind == "PNG":
            image.putalpha(200)
        elif number == 3:
            image = image.convert("L")
        elif number == 4:  # stored on its side
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = 6
        image.save(path, kind, **options)
    (root / "ape/broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    whole = (root / "bee/08.jpg").read_bytes()
    (root / "bee/cut.jpg").write_bytes(whole[: len(whole) // 2])
    return root


def _settings(folder: Path, output: Path, **changes) -> PrepareConfig:
    given = {"max_side": 32, "shard_images": 5, "max_bad_share": 0.2, "workers": 2}
    return PrepareConfig(source=f"folder:{folder}", output=str(output), **given | changes)


def _open(path: Path, *, training: bool = True, **settings) -> sources.Source:
    settings = {"eval_source": f"prepared:{path}"} | settings
    return sources.open_source(DataConfig(source=f"prepared:{path}", **settings), training=training)


def _load(source: sources.Source, index: int) -> dict[str, np.ndarray]:
    element = source.load(tf.constant(index, tf.int64))
    return {name: value.numpy() for name, value in element.items()}


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "set"
    return output, prepare.prepare(_settings(folder, output))


def test_the_same_images_and_labels_in_the_same_order(folder, finished):
    output, _ = finished
    source = _open(output)
    original = sources.open_source(
        DataConfig(source=f"folder:{folder}", eval_source=f"folder:{folder}"), training=True
    )
    good = [i for i in range(len(original)) if "broken" not in original.name(i)]
    good = [i for i in good if "cut" not in original.name(i)]
    assert len(source) == 12 == len(good)
    assert source.classes == original.classes == CLASSES
    assert source.fields == ("image", "label")
    for position, index in enumerate(good):
        actual, expected = _load(source, position), _load(original, index)
        assert actual["label"] == expected["label"]
        height, width = expected["image"].shape[:2]
        scale = 32 / min(height, width)
        assert actual["image"].shape == (round(height * scale), round(width * scale), 3)
        small = Image.fromarray(expected["image"]).resize(
            actual["image"].shape[1::-1], Image.Resampling.LANCZOS
        )
        # The loss of JPEG at quality 95.
        assert np.abs(actual["image"].astype(int) - np.asarray(small)).mean() < 3


def test_small_images_are_not_enlarged():
    image = tf.constant(np.random.default_rng(0).integers(0, 256, (20, 31, 3)), tf.uint8)
    np.testing.assert_array_equal(prepare.shrink(image, max_side=20), image)
    assert prepare.shrink(image, max_side=10).shape == (10, 16, 3)


def test_undecodable_images_are_left_out_and_named(folder, finished, tmp_path, capsys):
    output, header = finished
    assert header["undecodable"] == 2
    assert [Path(name).name for name in header["undecodable_names"]] == ["broken.jpg", "cut.jpg"]
    assert [shard["images"] for shard in header["shards"]] == [5, 4, 3]
    assert sorted(path.name for path in output.iterdir()) == [
        *(f"images-{i:05}-of-00003.array_record" for i in range(3)),
        "labels.npy",
        "prepared.json",
    ]
    with pytest.raises(RunError, match=r"2 of 14 images can't be decoded.*1\.0%"):
        prepare.prepare(_settings(folder, tmp_path / "strict", max_bad_share=0.01))
    arguments = [f"--source=folder:{folder}", f"--output={output}", "--max_side=32"]
    assert prepare.main([*arguments, "--shard_images=5"]) == 0
    assert "12 images, 2 classes, 3 files" in capsys.readouterr().out
    assert prepare.main([*arguments, "--shard_images=6"]) == 2
    assert "--shard_images: was 5" in capsys.readouterr().err


def test_a_set_is_complete_or_not_there(folder, finished, tmp_path, monkeypatch):
    """Stopped in the second file and continued, the command writes the same bytes, each once."""
    output, _ = finished
    settings = _settings(folder, tmp_path / "set")
    write, written = prepare._write_shard, []

    def stop(source, path, **where):
        written.append(path.name)
        if len(written) == 2:
            raise KeyboardInterrupt
        return write(source, path, **where)

    monkeypatch.setattr(prepare, "_write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(settings)
    with pytest.raises(ConfigError, match=r"no prepared\.json .* continues where it was stopped"):
        _open(tmp_path / "set")
    with pytest.raises(ConfigError, match="started with other settings: --quality: was 95"):
        prepare.prepare(_settings(folder, tmp_path / "set", quality=90))
    prepare.prepare(settings)
    assert written == [f"images-{i:05}-of-00003.array_record" for i in (0, 1, 1, 2)]
    for path in output.iterdir():
        actual = (tmp_path / "set" / path.name).read_bytes()
        if path.suffix == ".array_record":
            assert actual == path.read_bytes()
        elif path.suffix == ".json":
            assert json.loads(actual) == json.loads(path.read_text())


def test_a_second_command_in_the_same_folder_is_refused(folder, tmp_path, monkeypatch, capsys):
    """Both would write the same files at once."""
    from beit_jax.files import write_json

    seen = []

    def meanwhile(path, value):
        if not seen:
            seen.append(
                prepare.main([f"--source=folder:{folder}", f"--output={tmp_path}", "--workers=2"])
            )
        write_json(path, value)

    monkeypatch.setattr(prepare, "write_json", meanwhile)
    prepare.prepare(_settings(folder, tmp_path))
    assert seen == [2]
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("error:")] == [
        f"error: --output: another command is preparing '{tmp_path}'; wait for it, end it, or"
        " choose another folder"
    ]
    assert _open(tmp_path).size > 0


@pytest.mark.parametrize("bad", [10**9, -1, 5])
def test_a_note_of_images_that_its_file_has_not_is_damaged(tmp_path, bad):
    note = tmp_path / "note.json"
    note.write_text(json.dumps({"images": 4, "bad": [bad], "labels": []}))
    assert prepare._read_note(note, first=0, last=5) is None
    note.write_text(json.dumps({"images": 4, "bad": [4], "labels": []}))
    assert prepare._read_note(note, first=0, last=5) is not None


def test_an_output_that_is_a_file_or_a_damaged_set_is_one_line(folder, finished, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"--output: .* is a file, not a folder"):
        prepare.prepare(_settings(folder, tmp_path / "file"))
    shutil.copytree(finished[0], tmp_path / "set")
    header = json.loads((tmp_path / "set/prepared.json").read_text())
    del header["shards"]
    (tmp_path / "set/prepared.json").write_text(json.dumps(header))
    with pytest.raises(ConfigError, match=r"--output: .*prepared\.json is damaged"):
        prepare.prepare(_settings(folder, tmp_path / "set"))


def test_a_damaged_set_is_refused(folder, tmp_path):
    output = tmp_path / "set"
    prepare.prepare(_settings(folder, output))
    shard = output / "images-00001-of-00003.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=r"00001-of-00003.* bytes, not "):
        _open(output)
    shard.unlink()
    with pytest.raises(ConfigError, match="is missing"):
        _open(output)
    with pytest.raises(ConfigError, match="is not empty and no prepared set"):
        prepare.prepare(_settings(folder, folder))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("prepared.json", b'"ape"', b'"aqe"'),
        ("prepared.json", b'"quality": 95', b'"quality": 94'),
        ("prepared.json", b'"sha256": "', b'"sha256": "0'),
        ("prepared.json", b'"labels_sha256"', b'"mabels_sha256"'),
        ("labels.npy", np.int32(1).tobytes(), np.int32(0).tobytes()),
    ],
)
def test_names_and_labels_are_those_that_were_written(finished, tmp_path, name, old, new):
    output = tmp_path / "set"
    shutil.copytree(finished[0], output)
    content = (output / name).read_bytes()
    assert old in content
    (output / name).write_bytes(new.join(content.rsplit(old, 1)))
    with pytest.raises(ConfigError, match=rf"{name} is damaged: copy the set again"):
        _open(output)


def test_a_set_of_an_older_version_is_read(finished, tmp_path):
    """It has no digests."""
    output = tmp_path / "set"
    shutil.copytree(finished[0], output)
    header = json.loads((output / "prepared.json").read_text())
    del header["sha256"], header["labels_sha256"]
    (output / "prepared.json").write_text(json.dumps(header))
    assert len(_open(output)) == 12


def test_a_flipped_bit_of_an_image_makes_it_a_bad_image(finished, tmp_path):
    """ArrayRecord's own hashes show it: no other image is read, and the run goes on."""
    output = tmp_path / "set"
    shutil.copytree(finished[0], output)
    shard = output / "images-00000-of-00003.array_record"
    content = bytearray(shard.read_bytes())
    content[content.index(b"\xff\xd8\xff") + 400] ^= 16
    shard.write_bytes(content)
    source = _open(output)
    config = DataConfig(source="embedded", workers=1, max_bad_share=0.5)
    whole = Views(
        training=lambda element, key: {"image": tf.image.resize(element["image"], (8, 8))},
        evaluation=lambda element: {},
        fields=("image",),
    )
    bad_images = BadImages(source, max_share=config.max_bad_share)
    batches = pipeline.training_batches(
        source, config=config, views=whole, seed=1, batch_size=4, shard=0, shards=1
    )
    for _ in range(3):
        bad_images.count(next(batches))
    assert (bad_images.read, bad_images.bad) == (12, 1)


def test_images_without_labels_and_a_source_read_in_order(tmp_path):
    """A source without random access, as TFDS has them."""
    numbers = range(7)
    pictures = []
    for number in numbers:
        data = io.BytesIO()
        _picture(number, height=24, width=24).save(data, "PNG")
        pictures.append(data.getvalue())

    def sequence(*, seed, epoch, shard, shards):
        assert seed is None
        return tf.data.Dataset.from_tensor_slices(
            {"index": np.arange(7, dtype=np.int64), "data": pictures}
        )

    source = sources.Source(
        size=7,
        name=str,
        load=lambda record: {"image": decode_image(record["data"], exif_orientation=True)},
        sequence=sequence,
    )
    settings = _settings(tmp_path, tmp_path, max_side=100)
    records = list(prepare._encoded(source, first=3, last=6, config=settings))
    assert [record["index"] for record in records] == [3, 4, 5]
    for record in records:
        image = np.asarray(Image.open(io.BytesIO(record["jpeg"])))
        assert abs(int(image[..., 2].mean()) - 9 * int(record["index"])) <= 2


def test_batches_and_held_out_images(finished):
    """Shared between hosts like any source with random access; held-out images are disjoint."""
    output, _ = finished
    source = _open(output)
    config = DataConfig(source="embedded", workers=1)
    views = Views(
        training=lambda element, key: {"label": element["label"]},
        evaluation=lambda element: {"label": element["label"]},
        fields=("label",),
    )

    def read(shard, shards):
        batches = pipeline.training_batches(
            source, config=config, views=views, seed=1, batch_size=4, shard=shard, shards=shards
        )
        return [next(batches)["index"] for _ in range(3)]

    whole = np.concatenate(read(0, 1))
    assert sorted(whole) == list(range(12))
    halves = zip(read(0, 2), read(1, 2), strict=True)
    np.testing.assert_array_equal(np.concatenate([np.concatenate(pair) for pair in halves]), whole)

    kept = _open(output, eval_source="", holdout=4)
    held_out = _open(output, training=False, eval_source="", holdout=4)
    assert (len(kept), len(held_out)) == (8, 4)
    names = {kept.name(i) for i in range(8)} | {held_out.name(i) for i in range(4)}
    assert len(names) == 12
