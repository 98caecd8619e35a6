"""`python -m beit_jax.segment`: a folder of photographs becomes class maps, and bad ones a line."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import beit_jax
from beit_jax.drawing.class_maps import palette
from beit_jax.segment.command import main, output_names
from tests.weights.segmenter_test import SEGMENTER, saved

SIZES = {"a.jpg": (70, 50), "a.png": (33, 90), "deep/b.png": (20, 20)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "native"
    saved(path, SEGMENTER)
    return str(path)


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(1)
    for name, (width, height) in SIZES.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xffnothing")
    return tmp_path / "photos"


@pytest.mark.slow
def test_every_photograph_gets_a_map_an_overlay_and_a_place_on_the_sheet(
    weights, photos, tmp_path, capsys
):
    output = tmp_path / "painted"
    arguments = [str(photos), f"--weights={weights}", f"--output={output}", "--batch-size=2"]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "can't read broken.jpg" in said
    assert "1 of 4 images could not be read" in said
    files = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    stems = ("a.jpg", "a.png", "deep/b")  # those that share a stem keep their suffixes
    pictures = {f"{stem}{end}" for stem in stems for end in (".png", "_overlay.jpg")}
    assert files == pictures | {"sheet.png", "classes.json"}
    segmenter = beit_jax.load_segmenter(weights)
    for stem, name in zip(stems, SIZES, strict=True):
        with Image.open(output / f"{stem}.png") as picture:
            assert picture.mode == "P"
            assert picture.size == SIZES[name]
            classes = np.asarray(picture)
        with Image.open(photos / name) as photo:
            expected = segmenter.segment(np.asarray(photo.convert("RGB")))
        assert (classes == expected).mean() > 0.999
    written = json.loads((output / "classes.json").read_text())
    assert [entry["name"] for entry in written.values()] == ["road", "sky", "tree"]
    assert written["1"]["color"] == palette()[1].tolist()


def test_what_does_not_fit_is_one_line_before_anything_is_written(
    weights, photos, tmp_path, capsys
):
    output = tmp_path / "painted"
    start = [str(photos), f"--weights={weights}"]
    beside = tmp_path / "beside"
    shutil.copytree(photos, beside / "Sheet.png")
    for arguments, line in (
        ([*start, f"--output={photos}/in"], "--output: .* is in the folder of images"),
        ([*start, f"--output={output}", "--scales=1,x"], "--scales: '1,x' is no list"),
        ([*start, f"--output={output}", "--stride=49"], "stride: 49 leaves gaps between"),
        ([str(tmp_path / "x"), *start[1:], f"--output={output}"], "IMAGES: there is no folder"),
        ([str(beside), *start[1:], f"--output={output}"], "IMAGES: the folder of Sheet.png/a.jpg"),
        ([*start[:1], "--weights=nothing", f"--output={output}"], "nothing is not a checkpoint"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert re.search(line, error), error
        assert not output.exists()


@pytest.mark.slow
def test_the_shorter_side_can_be_said(weights, photos, tmp_path, capsys):
    output = tmp_path / "painted"
    arguments = [str(photos / "deep"), f"--weights={weights}", f"--output={output}"]
    assert main([*arguments, "--short-side=30", "--flip"]) == 0
    said = capsys.readouterr().err
    assert "windows of 48 pixels on a shorter side of 30, 2 pass(es)" in said


def test_names_that_would_collide_keep_their_suffixes():
    assert output_names(["a.jpg", "b.png", "c/a.jpg", "a.png"]) == {
        "a.jpg": "a.jpg",
        "b.png": "b",
        "c/a.jpg": "c/a",
        "a.png": "a.png",
    }


@pytest.mark.parametrize(
    ("names", "outputs"),
    [
        (["a.jpg", "a.jpg.png", "a.png"], ["a.jpg", "a.jpg.png", "a.png"]),
        (["deep/sheet.jpg", "sheet.jpg"], ["deep/sheet", "sheet.jpg"]),
        (["Sheet", "sheet_2.png"], ["Sheet_3", "sheet_2"]),
        (["A.png", "a.jpg"], ["A.png", "a.jpg"]),  # one file, on some disks
        (["A.jpg", "a.jpg"], ["A.jpg", "a.jpg_2"]),
        (["x.jpg", "x.png/b.jpg"], ["x.jpg", "x.png/b"]),
        (["a", "a.png", "a.png.png"], ["a", "a.png", "a.png.png"]),
    ],
)
def test_no_photograph_is_written_over_another_a_folder_or_the_sheet(names, outputs):
    assert list(output_names(names).values()) == outputs
