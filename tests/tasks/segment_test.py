"""Segmentation end to end: figures that hold, whatever the batch and the devices; bad settings."""

import dataclasses
import functools
import json

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from PIL import Image

import beit_jax
from beit_jax import jobs
from beit_jax.config import ConfigError
from beit_jax.models.segmenter import segmenter
from beit_jax.segmentation import sliding, windows
from beit_jax.tasks import segment, segment_images
from beit_jax.training import sharding
from beit_jax.training.evaluation_pass import evaluator
from beit_jax.training.state import state_from_params
from beit_jax.weights import convert, native
from tests.tasks import tiny

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
CLASSES = ("red", "green", "blue")
IGNORED = 9


def scenes(folder, *, number, seed):
    """Blocks of three colours, whose class is the colour, in images of all shapes."""
    rng = np.random.default_rng(seed)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for index in range(number):
        height, width = rng.integers(20, 90, 2)
        coarse = rng.integers(0, 3, (height // 12 + 1, width // 12 + 1))
        labels = coarse.repeat(12, axis=0).repeat(12, axis=1)[:height, :width]
        image = COLOURS[labels] + rng.integers(-20, 20, (height, width, 3))
        labels = np.where(rng.random(labels.shape) < 0.05, IGNORED, labels)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"images/{index}.png")
        Image.fromarray(labels.astype(np.uint8)).save(folder / f"labels/{index}.png")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    return scenes(root / "train", number=24, seed=0), scenes(root / "test", number=11, seed=1)


def settings(folders, **changes):
    """`tiny.segment` on scenes; changes by path, with two underscores for a dot."""
    config = tiny.segment()
    config.data.source, config.data.eval_source = (f"pairs:{folder}" for folder in folders)
    config.data.holdout = 0
    config.data.ignore_label = IGNORED
    config.data.augment.hue = 0  # colours are the classes
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        node = config
        for part in section.split("__") if section else ():
            node = node[part]
        node[key] = value
    return config.to_dict()


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """A run on colours, which are quickly learned."""
    workdir = tmp_path_factory.mktemp("segment") / "run"
    values = settings(folders, run__steps=60, run__eval_every=30)
    return values, workdir, jobs.run(values, workdir=str(workdir))


def held_out(folders):
    """Images and maps of the held-out folder, in its order, as files have them."""
    folder = folders[1]
    for path in sorted((folder / "images").iterdir(), key=lambda path: path.name):
        with Image.open(path) as image, Image.open(folder / "labels" / path.name) as labels:
            yield np.asarray(image.convert("RGB")), np.asarray(labels)


@pytest.mark.slow
def test_it_learns_and_the_figures_hold(trained, folders):
    """mIoU, mAcc and aAcc of the summary, recomputed image by image from files in NumPy."""
    values, workdir, summary = trained
    assert summary["miou"] > 0.6  # a fifth by chance
    config = jobs.parse_job(values)
    model = segmenter(config.model, head=config.head, classes=3)
    params = native.read_params(str(workdir))
    variables = native.read_params(str(workdir), part="variables")

    @jax.jit
    def classify(batch):
        return sliding.predict(
            functools.partial(model.apply, params, variables=variables),
            batch,
            normalization="half",
            passes=1,
            tile=32,
        )

    rooms = windows.Rooms(tile=32)
    counts = np.zeros((3, 3), np.int64)
    for image, labels in held_out(folders):
        prepared = windows.prepare_image(
            image, config=config.inference, crop=32, shorter=48, longer=192
        )
        tiles = classify(windows.pack([prepared], images=1, crop=32, rooms=rooms))
        found = windows.assemble(np.asarray(tiles[0]), size=prepared.size)
        assert found.shape == labels.shape
        known = labels != IGNORED
        np.add.at(counts, (labels[known], found[known]), 1)
    right, labelled, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    iou = right / (labelled + predicted - right)
    assert summary["miou"] == pytest.approx(iou.mean(), abs=1e-3)
    assert summary["iou/green"] == pytest.approx(iou[1], abs=1e-3)
    assert summary["macc"] == pytest.approx((right / labelled).mean(), abs=1e-3)
    assert summary["aacc"] == pytest.approx(right.sum() / counts.sum(), abs=1e-3)


@pytest.mark.slow
def test_any_batch_size_and_number_of_devices_evaluate_alike(trained):
    """11 images: no batch size here divides them but 1. The run's was 8, on 8 devices."""
    values, workdir, summary = trained
    params = native.read_params(str(workdir))
    variables = native.read_params(str(workdir), part="variables")
    results = []
    for batch_size, devices in ((6, 2), (1, 1)):
        run = values["run"] | {"batch_size": batch_size}
        config = jobs.parse_job(values | {"run": run, "evaluate_only": True})
        images = segment_images.open_images(config.data, labels=config.labels, classes=0)
        config = dataclasses.replace(config, classes=3, labels=images.labels)
        model = segmenter(config.model, head=config.head, classes=3)
        feed = segment_images.image_feed(
            images, data=config.data, inference=config.inference, run=config.run
        )
        mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:devices])
        task = segment.segment_task(model, config=config)
        state = state_from_params(params, optimizer=optax.identity(), variables=variables)
        state = jax.device_put(state, NamedSharding(mesh, sharding.REPLICATED))
        results.append(evaluator(task, feed, frozen={}, mesh=mesh)(state))
    for result in results:
        for name, value in result.items():
            assert value == pytest.approx(summary[name], abs=1e-4), name


@pytest.mark.slow
def test_it_leaves_a_summary_and_pictures(trained):
    _, workdir, summary = trained
    written = json.loads((workdir / "summary.json").read_text())
    assert written["miou"] == summary["miou"]
    assert written["best"]["value"] >= summary["miou"]
    for name in ("first_batch.png", "segmentation.png"):
        with Image.open(workdir / name) as picture:
            assert min(picture.size) > 100
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "head_loss", "auxiliary_loss", "pixel_accuracy"} <= lines[0].keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inference__stride": 33}, r"inference.stride: 33 leaves gaps between windows of 32"),
        ({"data__image_size": 64}, r"data.image_size: 64, but the model takes 32"),
        ({"head__blocks": (1, 2, 3, 9)}, r"head.blocks"),
        ({"head__kind": "segformer"}, r"head.kind"),
        ({"labels": ("a", "b"), "classes": 3}, r"labels: 2 names for 3 classes"),
        ({"data__source": "embedded:64", "classes": 4}, r"config.classes: 4, but .* 11 names"),
        ({"data__ignore_label": None}, r"9"),
        ({"labels": ("a", "b", "a")}, r"config.labels: two classes have the same name: 'a'"),
        (
            {"model__patch_size": 14, "model__image_size": 42, "data__image_size": 42},
            r"model.patch_size: 14 makes logits 12 wide, of which 42 pixels are no multiple",
        ),
    ],
)
def test_bad_settings_are_refused(folders, tmp_path, changes, message):
    values = settings(folders)
    for name, value in changes.items():  # not in the config, where settings refer to each other
        section, _, key = name.rpartition("__")
        (values[section] if section else values)[key] = value
    with pytest.raises(ConfigError, match=message):
        jobs.run(values, workdir=str(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run.pth", "imported"])
def test_a_run_in_another_form_evaluates_as_it_did(trained, tmp_path, name):
    """Parameters and running statistics, directly from the file or imported before."""
    pytest.importorskip("torch", reason="writing .pth takes PyTorch")
    values, workdir, summary = trained
    source = str(tmp_path / (name if name != "imported" else "run.pth"))
    convert.export_checkpoint(str(workdir), format="mmseg", output=source)
    if name == "imported":
        convert.import_checkpoint(source, output=str(tmp_path / name))
        source = str(tmp_path / name)
    run = values["run"] | {"init_from": source}
    found = jobs.run(
        values | {"run": run, "evaluate_only": True}, workdir=str(tmp_path / "evaluated")
    )
    for figure in ("miou", "macc", "aacc", "iou/green"):
        assert found[figure] == pytest.approx(summary[figure], abs=1e-4), figure


@pytest.mark.slow
def test_the_loaded_run_segments_as_it_was_evaluated(trained, folders):
    """`load_segmenter` takes window, stride and sizes from the run."""
    _, workdir, summary = trained
    loaded = beit_jax.load_segmenter(workdir, dtype="float32")
    assert (loaded.short_side, loaded.long_side, loaded.classes) == (48, 192, CLASSES)
    right = total = 0
    for image, labels in held_out(folders):
        classes = loaded.segment(image)
        right += int(((classes == labels) & (labels != IGNORED)).sum())
        total += int((labels != IGNORED).sum())
    assert summary["aacc"] == pytest.approx(right / total, abs=1e-3)
