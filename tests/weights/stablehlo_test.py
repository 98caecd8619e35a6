"""The exported program needs only JAX and NumPy to run, and gives the numbers of the model."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from beit_jax.models.functional import functional, unflatten
from beit_jax.models.heads import classifier
from beit_jax.models.vit import Encoder
from beit_jax.preprocessing import normalize
from beit_jax.weights import convert
from beit_jax.weights.__main__ import main
from beit_jax.weights.report import WeightsError
from tests.weights import examples

BATCHES = (2, 3)
LOADING = """
import json, sys
import jax, numpy as np
program = jax.export.deserialize(open(sys.argv[1], "rb").read())
arrays = {}
for name, images in np.load(sys.argv[2]).items():
    outputs = program.call(images)
    outputs = outputs if isinstance(outputs, dict) else {"logits": outputs}
    arrays |= {f"{name} {part}": np.asarray(array) for part, array in outputs.items()}
np.savez(sys.argv[3], **arrays)
print(json.dumps({
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "platforms": program.platforms,
}))
"""


@pytest.fixture
def run(tmp_path):
    """Runs a file on images in a process that imports JAX and NumPy alone."""

    def start(path: str, images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        np.savez(tmp_path / "images.npz", **images)
        result = subprocess.run(
            [sys.executable, "-c", LOADING, path, tmp_path / "images.npz", tmp_path / "out.npz"],
            cwd=tmp_path,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        said = json.loads(result.stdout)
        assert not {"beit_jax", "flax", "orbax"} & set(said["modules"])
        assert said["platforms"] == ["cpu", "tpu", "cuda"]
        return dict(np.load(tmp_path / "out.npz"))

    return start


def pixels(description) -> dict[str, np.ndarray]:
    size = description.model.image_size
    rng = np.random.default_rng(0)
    return {
        str(count): rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        for count in BATCHES
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", examples.FINE_TUNED)
def test_a_classifier_gives_its_logits(kind, run, tmp_path):
    description = examples.FINE_TUNED[kind]
    params = examples.saved(tmp_path / "native", description)
    output = str(tmp_path / "x.stablehlo")
    done = convert.export_checkpoint(str(tmp_path / "native"), format="stablehlo", output=output)
    assert set(done.report.used) == set(params)
    assert done.report.unused == ()
    assert done.load == f"jax.export.deserialize(open({output!r}, 'rb').read()).call(images)"
    model = classifier(description.model, classes=description.outputs, pooling=description.pooling)
    images = pixels(description)
    outputs = run(output, images)
    for name, batch in images.items():
        pixels_in = normalize(batch, kind=description.normalization)
        expected = jax.jit(model.apply)(unflatten(params), pixels_in)
        assert examples.relative_error(outputs[f"{name} logits"], expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", examples.PRETRAINED)
def test_a_pre_training_checkpoint_gives_its_encoder(kind, run, tmp_path):
    """The tokens after the final norm; both normalisations and kinds of positions."""
    description = examples.PRETRAINED[kind]
    params = examples.saved(tmp_path / "native", description)
    output = str(tmp_path / "x.stablehlo")
    done = convert.export_checkpoint(str(tmp_path / "native"), format="stablehlo", output=output)
    assert set(done.report.unused) == {"encoder/mask_token", "lm_head/kernel", "lm_head/bias"}
    encoder = functional(
        lambda rngs: Encoder(description.model, mask_token=True, final_norm=True, rngs=rngs)
    )
    images = pixels(description)
    outputs = run(output, images)
    grid, width = description.model.grid, description.model.width
    for name, batch in images.items():
        pixels_in = normalize(batch, kind=description.normalization)
        tokens = np.asarray(jax.jit(encoder.apply)(unflatten(params)["encoder"], pixels_in))
        assert examples.relative_error(outputs[f"{name} cls"], tokens[:, 0]) < 1e-5
        patches = tokens[:, 1:].reshape(len(batch), grid, grid, width)
        assert examples.relative_error(outputs[f"{name} patches"], patches) < 1e-5


def test_another_image_size_and_a_foreign_source(run, tmp_path):
    """A Hugging Face folder at another resolution, on the command line."""
    description = examples.PRETRAINED["beit+"]
    examples.saved(tmp_path / "native", description)
    folder, output = str(tmp_path / "hf"), str(tmp_path / "x.stablehlo")
    assert (
        main(["export", str(tmp_path / "native"), "--format=hugging_face", f"--output={folder}"])
        == 0
    )
    export = ["export", folder, "--format=stablehlo", f"--output={output}", "--image-size=64"]
    assert main(export) == 0
    outputs = run(output, {"one": np.zeros((1, 64, 64, 3), np.uint8)})
    assert outputs["one patches"].shape == (1, 8, 8, 32)


def test_it_can_be_written_not_read(tmp_path):
    (tmp_path / "x.stablehlo").touch()
    with pytest.raises(WeightsError, match="the format stablehlo can be written, not read"):
        convert.read_any(str(tmp_path / "x.stablehlo"))
    with pytest.raises(WeightsError, match=r"must end in \.stablehlo"):
        convert.export_checkpoint("runs/x", format="stablehlo", output="x.hlo")
