"""The built wheel, installed without extras in an environment of its own, as a user has it."""

import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from beit_jax.weights import convert
from tests.weights import examples

ROOT = pathlib.Path(__file__).parent.parent
# What the wheel is built from: pyproject.toml, and what it reads.
BUILT_FROM = ("beit_jax", "launch", "requirements", "README.md", "LICENSE", "NOTICE")
BUILT_FROM += ("pyproject.toml", "tests/requirements.txt")
# Neither installed nor imported. Flax itself requires optax and orbax-checkpoint: those are
# installed, and of the two it imports only optax.
ABSENT = ("tensorflow", "tensorflow_datasets", "clu", "torch", "transformers", "ml_collections")
NOT_IMPORTED = (*ABSENT, "orbax", "tensorstore")
TOLERANCE = 1e-4

pytestmark = pytest.mark.slow


def run(*command: str | pathlib.Path, **options) -> str:
    """Runs a command; its error output is the message where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("wheel")
    folder = tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        target = folder / "source" / name
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", folder, folder / "source")
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> pathlib.Path:
    """The folder of an environment that holds the wheel and its dependencies, nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--retries=1", str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "beit-jax" not in installed(folder):
        unreachable = ("Connection", "Could not find a version", "Temporary failure")
        if any(words in done.stderr for words in unreachable):
            pytest.skip(f"no package index to install the dependencies from: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    return folder


def installed(environment: pathlib.Path) -> set[str]:
    lines = run(environment / "bin/python", "-m", "pip", "list", "--format=freeze").splitlines()
    return {line.split("==")[0].lower().replace("_", "-") for line in lines}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> pathlib.Path:
    """A folder with a checkpoint in three formats, images, and transformers' numbers for them."""
    torch = pytest.importorskip("torch", reason="the peer runs on PyTorch")
    transformers = pytest.importorskip("transformers", reason="the peer is not installed")
    folder = tmp_path_factory.mktemp("sources")
    examples.saved(folder / "run", examples.PRETRAINED["beit+"])
    for format, name in (("hugging_face", "hf"), ("timm", "timm.safetensors"), ("unilm", "u.pth")):
        convert.export_checkpoint(str(folder / "run"), format=format, output=str(folder / name))
    images = np.random.default_rng(2).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    model = transformers.BeitForMaskedImageModeling.from_pretrained(folder / "hf").eval()
    pixels = torch.from_numpy((images / 127.5 - 1).astype(np.float32).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        output = model.beit(pixels, output_hidden_states=True)
        normed = model.layernorm(output.last_hidden_state)
    (folder / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
    np.savez(folder / "expected.npz", normed=normed, second=output.hidden_states[2])
    return folder


LOAD = f"""
import sys
import time

start = time.perf_counter()
import beit_jax
took = time.perf_counter() - start
assert not {{"jax", "numpy"}} & set(sys.modules)

import numpy as np

folder = sys.argv[1]
images, peer = np.load(f"{{folder}}/images.npy"), np.load(f"{{folder}}/expected.npz")
for name in ("hf", "timm.safetensors", "u.pth"):
    encoder = beit_jax.load_encoder(f"{{folder}}/{{name}}", heads=4)
    out = encoder(images)
    (second,) = encoder.blocks(images, [2])
    for output, expected in ((out, peer["normed"]), (second, peer["second"])):
        tokens = np.concatenate([output.cls[:, None], output.patches.reshape(2, 25, 32)], axis=1)
        error = np.abs(tokens - expected).max() / np.abs(expected).max()
        assert error < {TOLERANCE}, (name, error)
for name in {NOT_IMPORTED!r}:
    assert name not in sys.modules, name
assert "site-packages" in beit_jax.__file__, beit_jax.__file__
print(f"{{took:.3f}}")
"""


def test_three_lines_in_an_environment_without_training(environment, sources, tmp_path):
    names = installed(environment)
    assert not {name.replace("_", "-") for name in ABSENT} & names
    assert not {"tensorflow-cpu", "tensorboard"} & names
    took = run(environment / "bin/python", "-c", LOAD, sources, cwd=tmp_path)
    assert float(took) < 0.5, "`import beit_jax` is quick"


def test_commands_in_an_environment_without_training(environment, sources, tmp_path):
    command = environment / "bin/beit-jax"
    assert "convert-tokenizer" in run(command, "--help", cwd=tmp_path)
    assert "format: timm" in run(command, "inspect", sources / "timm.safetensors", cwd=tmp_path)
    refused = subprocess.run(
        [command, "prepare", "--help"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert refused.returncode == 2
    assert "pip install 'beit-jax[train]'" in refused.stderr


def test_features_of_a_folder_in_an_environment_without_training(environment, sources, tmp_path):
    command = [environment / "bin/beit-jax", "features", sources / "images"]
    settings = (f"--weights={sources / 'hf'}", "--output=features.npz", "--resize=squash")
    run(*command, *settings, cwd=tmp_path)  # images of the size asked for stay as they are
    written = np.load(tmp_path / "features.npz")
    expected = np.load(sources / "expected.npz")["normed"][:, 0]
    assert written["names"].tolist() == ["0.png", "1.png"]
    assert np.abs(written["features"] - expected).max() / np.abs(expected).max() < TOLERANCE


def test_the_wheel_says_that_it_is_typed_and_holds_the_package_alone(wheel, tmp_path):
    shutil.unpack_archive(wheel, tmp_path, format="zip")
    assert (tmp_path / "beit_jax" / "py.typed").exists()
    for name in ("page.html", "page.css", "page.js"):
        assert (tmp_path / "beit_jax" / "report" / name).exists()
    (info,) = tmp_path.glob("*.dist-info")
    assert {path.name for path in tmp_path.iterdir()} == {"beit_jax", info.name}
    assert {path.name for path in (info / "licenses").iterdir()} == {"LICENSE", "NOTICE"}
