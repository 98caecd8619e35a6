"""Broken set-ups, each of which the doctor names, with what to do; and sound ones, where it is
silent."""

import dataclasses
import errno
import importlib.metadata
import json
import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from beit_jax import jobs, storage
from beit_jax.config import to_dict
from beit_jax.doctor import checks, images, machine, step, tokens, versions
from beit_jax.doctor.checks import CHECKS, findings_of
from beit_jax.doctor.context import Context
from beit_jax.models.heads import masked_image_model
from beit_jax.tokenizers.loading import open_tokenizer, save_params
from beit_jax.tokenizers.tokenizer import Tokenizer
from beit_jax.weights.native import write_params
from tests.tasks import tiny

SIDE = 40  # pixels


def found(*names, workdir="runs/never_made", platform="any", **changes):
    """What checks of the tiny pre-training say; "data__source" is `config.data.source`."""
    values = tiny.pretrain().to_dict()
    for name, value in changes.items():
        *sections, last = name.split("__")
        section = values
        for part in sections:
            section = section[part]
        section[last] = value
    context = Context(jobs.parse_job(values), workdir=str(workdir), platform=platform)
    return [finding for name in names for finding in findings_of(name, context)]


def assert_wrong(findings, *texts):
    """One finding of these is wrong, has these words, and says what to do."""
    (finding,) = [finding for finding in findings if finding.level == "wrong"]
    for text in texts:
        assert text in finding.what
    assert finding.fix


def assert_sound(findings):
    assert findings
    assert [finding for finding in findings if finding.level != "ok"] == []


def folder(path, pictures):
    """A folder of PNGs, uint8 [h, w, 3] each, or bytes that are none."""
    path.mkdir()
    for number, picture in enumerate(pictures):
        name = path / f"{number:02}.png"
        if isinstance(picture, bytes):
            name.write_bytes(picture)
        else:
            Image.fromarray(picture).save(name)
    return {"data__source": f"folder:{path}", "data__holdout": 4}


def noise(count, *, mean=120, deviation=60):
    rng = np.random.default_rng(0)
    pixels = rng.normal(mean, deviation, (count, SIDE, SIDE, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


IMAGES = ("images", "pixels", "normalization")


@pytest.fixture(scope="module")
def sound():
    """The tiny pre-training as it is."""
    return Context(jobs.parse_job(tiny.pretrain().to_dict()), workdir="runs/never_made")


def test_a_sound_set_up(sound):
    names = ("devices", "batch", "weights", *IMAGES, "run", "memory", "room")
    assert_sound([finding for name in names for finding in findings_of(name, sound)])


def test_segmentation_is_checked_too():
    """Its images, and the parts of its step; the step itself costs a compilation."""
    config = jobs.parse_job(tiny.segment().to_dict())
    context = Context(config, workdir="runs/never_made")
    names = ("batch", *IMAGES, "run", "memory", "room")
    assert_sound([one for name in names for one in findings_of(name, context)])


def test_photographs_are_sound():
    path = os.environ.get("BEIT_JAX_IMAGES")
    if not path:
        pytest.skip("set BEIT_JAX_IMAGES to a folder of at least 40 photographs")
    assert_sound(found(*IMAGES, data__source=f"folder:{path}", data__holdout=8))


def test_images_of_one_colour(tmp_path):
    flat = [np.full((SIDE, SIDE, 3), 40 + 9 * level, np.uint8) for level in range(20)]
    assert_wrong(found("pixels", **folder(tmp_path / "a", flat)), "20 of 20", "one colour")


def test_the_same_image_under_many_names(tmp_path):
    same = [noise(1)[0]] * 20
    assert_wrong(found("pixels", **folder(tmp_path / "a", same)), "only 1 of 20 images differ")


def test_images_that_were_normalised_before_they_were_stored(tmp_path):
    normalised = noise(20, mean=0, deviation=1)  # -1..1, of which 8 bits keep 0 and 1
    settings = folder(tmp_path / "a", normalised)
    assert_wrong(found("normalization", **settings), "mean 0.00", "not what photographs have")


def test_images_much_smaller_than_the_crop(tmp_path):
    small = [picture[:12, :12] for picture in noise(20)]
    (finding,) = found("pixels", **folder(tmp_path / "a", small))
    assert finding.level == "warning"
    assert "12 pixels" in finding.what


def test_a_folder_that_is_not_there_is_said_once(tmp_path):
    findings = found(*IMAGES, "masks", data__source=f"folder:{tmp_path}/nothing")
    assert_wrong(findings, "config.data.source", "nothing")
    assert [finding.level for finding in findings[1:]] == ["skipped"] * 3


def test_mostly_corrupt_images(tmp_path):
    pictures = [*noise(8), *[b"\x89PNG\r\n\x1a\n cut"] * 12]
    findings = found("images", **folder(tmp_path / "a", pictures))
    assert_wrong(findings, "12 of 20 images can't be decoded", ".png")


def test_one_bad_image_of_many_is_a_warning():
    seen = images.Photographs(found=[], tried=200, bad=["a.jpg"])
    (finding,) = images.bad_share(seen, allowed=0.01)
    assert finding.level == "warning"


def test_no_held_out_images():
    assert_wrong(found("images", data__holdout=0, data__source="embedded"), "holdout")


def test_no_tpu_where_one_is_required():
    assert_wrong(found("devices", platform="tpu"), "expected tpu", "found cpu")


def test_a_kernel_of_another_platform():
    assert_wrong(found("devices", model__attention="cudnn"), "config.model.attention")


def test_an_idle_accelerator(monkeypatch):
    monkeypatch.setattr(machine, "_HARDWARE", {os.devnull: "a GPU"})
    monkeypatch.delenv("JAX_PLATFORMS")
    assert_wrong(found("devices"), "although this machine has a GPU")


def test_a_batch_that_does_not_divide_over_the_devices():
    findings = found("batch", "masks", run__batch_size=12)
    assert_wrong(findings, "config.run.batch_size: 12", "8 devices")
    assert findings[1].level == "skipped"


def test_a_batch_too_large_for_memory(monkeypatch, sound):
    monkeypatch.setattr(machine, "device_bytes", lambda: 2_000_000)
    findings = [*findings_of("memory", sound), *findings_of("step", sound)]
    assert_wrong(findings, "does not fit", "2 MB")
    assert "batch_size, now 8" in findings[0].fix
    assert findings[1].level == "skipped"
    more = dataclasses.replace(sound.config.run, batch_size=8000)
    before = machine.least_bytes(sound)
    monkeypatch.setattr(sound, "config", dataclasses.replace(sound.config, run=more))
    assert machine.least_bytes(sound) - before == 999 * 17 * 32 * 4 * 2  # on a device


def test_a_full_disk(monkeypatch, sound):
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
    assert_wrong(findings_of("room", sound), "1 kB free")


def test_a_directory_that_may_not_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert_wrong(found("workdir", workdir=tmp_path / "file"), "it is a file, not a folder")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert_wrong(found("workdir", workdir=tmp_path), "may not be written to")
    monkeypatch.undo()

    def refuse(dir):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert_wrong(found("workdir", workdir=tmp_path), str(tmp_path), "quota")


def test_a_directory_of_another_program(tmp_path):
    assert_sound(found("workdir", workdir=tmp_path))
    (tmp_path / "config.json").write_text('{"name": "mine"}')
    before = sorted(tmp_path.iterdir())
    assert_wrong(found("workdir", workdir=tmp_path), "was written by another program")
    assert sorted(tmp_path.iterdir()) == before


def test_a_directory_of_another_run(tmp_path):
    values = tiny.pretrain()
    values.model.width = 64
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(jobs.parse_job(values.to_dict()))))
    findings = found("run", workdir=tmp_path)
    assert_wrong(findings, "config.model.width: was 64, now 32")
    assert findings[0].fix == "choose another --workdir"
    assert findings[0].fix not in findings[0].what


def test_weights_that_were_trained_with_another_normalisation(tmp_path):
    config = jobs.parse_job(tiny.pretrain().to_dict())
    assert config.data.normalization == "imagenet"
    data = dataclasses.replace(config.data, normalization="half")
    model = masked_image_model(config.model, vocabulary=config.tokenizer.vocabulary)
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    saved = to_dict(dataclasses.replace(config, data=data))
    write_params(str(tmp_path / "weights"), params, config=saved)
    findings = found("weights", run__init_from=str(tmp_path / "weights"))
    assert_wrong(findings, "config.data.normalization", "half")


def test_a_tokenizer_file_that_is_missing_damaged_or_of_another_scale(tmp_path):
    path = str(tmp_path / "tokenizer.safetensors")
    settings = {"tokenizer__path": path, "tokenizer__random_weights": False}
    assert_wrong(found("tokenizer", **settings), path, "does not exist")

    config = jobs.parse_job(tiny.pretrain().to_dict()).tokenizer
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32),
        jax.eval_shape(open_tokenizer(config).init, jax.random.key(0)),
    )
    save_params(path, params, config=config)
    assert_sound(found("tokenizer", **settings))
    # All its weights are zero: every image gets the same tokens.
    assert_wrong(found("tokens", **settings)[:1], "the most frequent one 100%", "collapsed")

    with open(path, "r+b") as file:
        file.truncate(1000)
    findings = found("tokenizer", "tokens", "masks", **settings)
    assert_wrong(findings, "not a whole safetensors file")
    assert [finding.level for finding in findings[1:]] == ["skipped"] * 2


def grey_tokenizer():
    """A token is the level of grey, of 16, nearest to the mean of a cell of 4 × 4 pixels."""

    def pixel_features(params, pixels):
        b, height, width, _ = pixels.shape
        return pixels.reshape(b, height // 4, 4, width // 4, 4, 3).mean((2, 4, 5))[..., None]

    def pixel_decode(params, ids):
        levels = params["levels"][ids]
        return jnp.repeat(jnp.repeat(levels, 4, 1), 4, 2)[..., None] * jnp.ones(3)

    return Tokenizer(
        vocabulary=16,
        image_size=16,
        grid=4,
        init=lambda key: {"levels": jnp.linspace(0, 1, 16)},
        encoding_params=lambda params: params,
        pixel_features=pixel_features,
        feature_logits=lambda params, features: -jnp.abs(features - params["levels"]),
        pixel_decode=pixel_decode,
        decoding_parts=("levels",),
    )


def gradients(count):
    """Smooth grey images, uint8 [b, 16, 16, 3]."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 16)
    ends = rng.uniform(0, 255, (count, 2))
    rows = ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * ramp
    return np.repeat(np.repeat(rows[:, :, None, None], 16, 2), 3, 3).astype(np.uint8)


@pytest.mark.parametrize("scale", [255.0, 100.0])
def test_a_tokenizer_made_for_another_range_of_pixels(scale):
    """Its levels are those of [0, 255] where the images are in [0, 1]."""
    tokenizer, pictures = grey_tokenizer(), gradients(32)
    params = tokenizer.init(jax.random.key(0))
    assert_sound(tokens.token_findings(tokenizer, params, pictures))
    scaled = {"levels": params["levels"] * scale}
    assert_wrong(tokens.token_findings(tokenizer, scaled, pictures)[:1], "collapsed")


def test_a_tokenizer_whose_pictures_are_not_those_of_its_tokens():
    """The wrong scale shows where tokens still differ: half the levels are beyond white."""
    tokenizer, pictures = grey_tokenizer(), gradients(32)
    painted = np.asarray(tokenizer.decode({"levels": jnp.linspace(0, 1, 16)}, ids(tokenizer)))
    assert_sound(tokens.repainted(painted, pictures))
    assert_wrong(tokens.repainted(1 - painted, pictures), "do not describe the images")
    colours = np.broadcast_to(pictures.mean((1, 2), keepdims=True) / 255, painted.shape)
    (finding,) = tokens.repainted(0.95 * colours + 0.05 * painted, pictures)
    assert finding.level == "warning"


def ids(tokenizer):
    return tokenizer.encode({"levels": jnp.linspace(0, 1, 16)}, gradients(32))


def test_tokens_that_are_noise():
    rng = np.random.default_rng(0)
    assert_wrong(tokens.distribution(rng.integers(0, 16, (64, 8, 8)), vocabulary=16), "noise")
    # All codes as often, but in areas, as of real images.
    areas = np.repeat(np.repeat(rng.integers(0, 16, (64, 2, 2)), 4, 1), 4, 2)
    assert_sound(tokens.distribution(areas, vocabulary=16))


def test_images_without_a_masked_patch():
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :2, :2] = True
    assert_wrong(images.masked(masks), "no patches masked")


def test_slow_data():
    """A feed that takes a second for 8 images, and a step that wants 100 a second, for hours."""
    now = [0.0]

    def batches():
        while True:
            now[0] += 1
            yield {"image": np.zeros((8, 1))}

    read = images.reading_speed(batches(), seconds=3, clock=lambda: now[0])
    assert read == 8
    assert_wrong(step.enough(read, needed=100, minutes=600), "data-starved: 8 images/s", "100")
    assert_sound(step.enough(read, needed=100, minutes=1))
    assert_sound(step.enough(read, needed=6, minutes=600))
    assert [one.level for one in step.enough(8, needed=7.9, minutes=600)] == ["warning"]


def test_a_loss_that_is_not_finite_and_one_that_is_not_guessing():
    assert_sound(step.first_loss([4.2, 4.1], classes=64))
    assert_wrong(step.first_loss([4.2, float("nan")], classes=64), "nan")
    assert [one.level for one in step.first_loss([19.0], classes=64)] == ["warning"]


def test_a_run_of_months():
    assert_sound(step.duration(0.5, steps=1000, note="", compiling=1))
    (finding,) = step.duration(60, steps=100_000, note="", compiling=1)
    assert finding.level == "warning"
    assert "69.4 days" in finding.what


def test_packages_out_of_range(monkeypatch):
    assert_sound(found("versions"))
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.4.1" if name == "jax" else installed(name)
    )
    assert_wrong(found("versions"), "jax 0.4.1, not >=0.10.2")


@pytest.mark.parametrize(
    ("line", "outside"),
    [
        ("numpy>=2.0", False),
        ("numpy>=1.26,<1.27", True),
        ("numpy>=2.0rc1", False),
        ("no-such-package-here>=1", True),
    ],
)
def test_ranges_of_versions(line, outside):
    assert bool(versions.misfits([line])) == outside


def test_an_error_of_a_check_is_a_finding_and_later_checks_go_on(monkeypatch):
    def fail(context):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setitem(CHECKS, "batch", dataclasses.replace(CHECKS["batch"], run=fail))
    findings = found("batch", "weights")
    assert_wrong(findings, "RuntimeError: first line")
    assert findings[1].level == "ok"


def test_a_run_over_few_images_without_end_is_a_warning(tmp_path):
    source = folder(tmp_path / "few", noise(12))
    (finding,) = found("images", **source, run__steps=500_000)
    assert finding.level == "warning"
    assert "epochs of 8 images" in finding.what
    assert "500,000 steps" in finding.what


def test_a_long_error_is_cut_at_a_word(monkeypatch):
    def fail(context):
        raise ValueError("lengthy " * 200)

    monkeypatch.setitem(checks.CHECKS, "batch", dataclasses.replace(CHECKS["batch"], run=fail))
    (finding,) = found("batch")
    assert finding.what.endswith("lengthy …")
