"""Weights by repository name, against a hub on loopback."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from beit_jax.weights import convert, hub
from beit_jax.weights.report import WeightsError
from tests.weights import examples
from tests.weights.hub_server import HubServer

pytest.importorskip("huggingface_hub", reason="the extra [hub] is not installed")
ROOT = pathlib.Path(__file__).parent.parent.parent
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"card"}


@pytest.fixture
def server():
    with HubServer() as running:
        yield running


@pytest.fixture
def run(server, tmp_path):
    """Runs Python in a process of its own, since huggingface_hub reads its settings at import."""

    def start(script: str, **environment) -> subprocess.CompletedProcess:
        settings = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",  # the server has no Xet storage
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env=os.environ | settings | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return start


def resolved(run, source: str, **environment) -> str:
    """The path that `resolve` gives, or its error's message."""
    (line,) = resolved_all(run, [source], **environment)
    return line


def resolved_all(run, sources: list[str], **environment) -> list[str]:
    """The same for several, in one process."""
    script = f"""
from beit_jax.weights.hub import resolve
from beit_jax.weights.report import WeightsError
for source in {sources!r}:
    try:
        print(resolve(source))
    except WeightsError as error:
        print("error:", error)
"""
    result = run(script, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_other_paths_stay_as_they_are():
    for path in ("runs/base", "/a/b.pth", "gs://bucket/run", "huggingface"):
        assert hub.resolve(path) == path


@pytest.mark.parametrize("source", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b@", "hf:../x"])
def test_a_malformed_name_is_an_error(source):
    with pytest.raises(WeightsError, match="a repository is written hf:OWNER/NAME"):
        hub.resolve(source)


def test_revisions_may_be_branches_with_slashes():
    parsed = hub.parse("hf:owner/some-name.v2@refs/pr/1")
    assert parsed == hub.Repository(name="owner/some-name.v2", revision="refs/pr/1")


def test_without_huggingface_hub_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r"^hf:a/b: .*pip install beit-jax\[hub\]$"):
        hub.resolve("hf:a/b")


def test_download_revision_and_cache(server, run, tmp_path):
    first = server.add("owner/name", FILES)
    server.add("owner/name", {"model.safetensors": b"newer"})
    folder = pathlib.Path(resolved(run, "hf:owner/name", HF_TOKEN="hf_secret"))
    assert folder.is_relative_to(tmp_path / "cache")
    assert (folder / "model.safetensors").read_bytes() == b"newer"
    assert not (folder / "README.md").exists(), "only what is read is downloaded"
    assert server.tokens == {"Bearer hf_secret"}
    old = pathlib.Path(resolved(run, f"hf:owner/name@{first}"))
    assert (old / "model.safetensors").read_bytes() == b"weights"
    # What has not changed is not downloaded again.
    server.requests.clear()
    assert resolved(run, "hf:owner/name") == str(folder)
    assert not [request for request in server.requests if "/resolve/" in request]


@pytest.mark.slow
def test_the_cache_serves_without_the_server(server, run):
    server.add("owner/name", FILES)
    folder = resolved(run, "hf:owner/name")
    server.stop()
    assert resolved(run, "hf:owner/name", HF_HUB_OFFLINE="1") == folder
    offline = resolved(run, "hf:owner/other", HF_HUB_OFFLINE="1")
    assert offline == (
        "error: hf:owner/other: not in the cache, and HF_HUB_OFFLINE forbids downloading it"
    )
    unreachable = resolved(run, "hf:owner/other")
    assert unreachable == (
        f"error: hf:owner/other: not in the cache, and {server.url} can't be reached"
    )


@pytest.mark.slow
def test_what_does_not_exist_is_named(server, run):
    server.add("owner/name", FILES)
    server.add("owner/data", {"README.md": b"card"})
    assert resolved(run, "hf:owner/missing").startswith(
        "error: hf:owner/missing: no repository owner/missing"
    )
    assert resolved(run, "hf:owner/name@v9") == (
        "error: hf:owner/name@v9: owner/name has no revision v9"
    )
    assert "hf:owner/data holds no weights: no model.safetensors" in resolved(run, "hf:owner/data")


@pytest.mark.slow
def test_a_pickle_is_taken_only_without_safetensors(server, run):
    server.add("owner/both", FILES | {"pytorch_model.bin": b"pickle"})
    server.add("owner/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    server.add("owner/unilm", {"beit_base.pth": b"pickle", "README.md": b"card"})
    folder = pathlib.Path(resolved(run, "hf:owner/both"))
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    folder = pathlib.Path(resolved(run, "hf:owner/old"))
    assert sorted(os.listdir(folder)) == ["config.json", "pytorch_model.bin"]
    file = pathlib.Path(resolved(run, "hf:owner/unilm"))
    assert file.name == "beit_base.pth"
    assert file.read_bytes() == b"pickle"


def test_shards_are_downloaded_as_their_index_says(server, run):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "part[2].safetensors"}}
    shards = {name: name.encode() for name in index["weight_map"].values()}
    unused = {"model-00003-of-00003.safetensors": b"", "pytorch_model.bin": b"", "x.pth": b""}
    files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **shards,
        **unused,
    }
    server.add("owner/sharded", files)
    folder = pathlib.Path(resolved(run, "hf:owner/sharded"))
    assert set(os.listdir(folder)) == files.keys() - unused.keys()
    for name, content in shards.items():
        assert (folder / name).read_bytes() == content
    server.stop()
    assert resolved(run, "hf:owner/sharded", HF_HUB_OFFLINE="1") == str(folder)


def test_variants_other_names_and_what_is_refused(server, run):
    server.add("owner/half", {"config.json": b"{}", "model.fp16.safetensors": b"half"})
    server.add("owner/named", {"config.json": b"{}", "beit.safetensors": b"x", "README.md": b""})
    server.add("owner/tar", {"model_best.pth.tar": b"x", "args.yaml": b""})
    server.add("owner/index", {"model.safetensors.index.json": b'{"weight_map": {"a": "b.bin"}}'})
    server.add("owner/two", {"a.pth": b"x", "b.pth": b"x"})
    evil = {"weight_map": {"a": "../../../etc/passwd"}}
    server.add("owner/evil", {"model.safetensors.index.json": json.dumps(evil).encode()})
    names = ("half", "named", "tar", "index", "two", "evil")
    half, named, tar, index, two, refused = resolved_all(
        run, [f"hf:owner/{name}" for name in names]
    )
    assert sorted(os.listdir(half)) == ["config.json", "model.fp16.safetensors"]
    assert sorted(os.listdir(named)) == ["beit.safetensors", "config.json"]
    assert tar.endswith("/model_best.pth.tar")
    assert index.endswith("/model.safetensors.index.json")
    assert two == (
        "error: hf:owner/two holds several files of weights, a.pth, b.pth; give the path of one"
    )
    assert refused.startswith("error: ")
    assert "is refused: a is in '../../../etc/passwd'" in refused


@pytest.mark.slow
def test_every_command_and_init_from_take_a_repository(server, run, tmp_path):
    description = examples.PRETRAINED["beit+"]
    params = examples.saved(tmp_path / "native", description)
    convert.export_checkpoint(
        str(tmp_path / "native"), format="hugging_face", output=str(tmp_path / "exported")
    )
    files = {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()}
    server.add("owner/name", files)
    script = """
import numpy as np
from beit_jax.models.functional import flatten
from beit_jax.weights import convert
from beit_jax.weights.__main__ import main
from tests.weights import examples
assert main(["inspect", "hf:owner/name"]) == 0
assert main(["import", "hf:owner/name@main", "--output=imported"]) == 0
assert main(["export", "hf:owner/name", "--format=timm", "--output=x.safetensors"]) == 0
assert main(["inspect", "hf:owner/missing"]) == 2
shapes = examples.PRETRAINED["beit+"].shapes()
from beit_jax.models.functional import unflatten
params = flatten(convert.restore_params("hf:owner/name", shapes=unflatten(shapes)))
np.savez("restored.npz", **{name: np.asarray(array) for name, array in params.items()})
try:
    convert.restore_params("hf:owner/missing", shapes=unflatten(shapes))
except convert.WeightsError as error:
    print(error)
"""
    result = run(script)
    assert result.returncode == 0, result.stderr
    assert "format: hugging_face" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(
        "config.run.init_from: hf:owner/missing: no repository owner/missing"
    )
    assert "error: hf:owner/missing: no repository" in result.stderr
    restored = np.load(tmp_path / "restored.npz")
    for name, array in params.items():
        np.testing.assert_array_equal(restored[name], array, err_msg=name)
    for path in ("imported", "x.safetensors"):
        again = convert.read_any(str(tmp_path / path))[0]
        np.testing.assert_array_equal(again["encoder/cls_token"], params["encoder/cls_token"])


@pytest.mark.slow
@pytest.mark.parametrize("format", ["hugging_face", "timm"])
def test_an_export_is_pushed_and_read_back(format, server, run, tmp_path):
    """A timm export is stored under the hub's names, so that its repository can be read."""
    params = examples.saved(tmp_path / "native", examples.FINE_TUNED["mean"])
    output = {"hugging_face": "exported", "timm": "x.safetensors"}[format]
    script = f"""
import numpy as np
from beit_jax.weights import convert
from beit_jax.weights.__main__ import main
arguments = ["export", "native", "--format={format}", "--output={output}"]
assert main([*arguments, "--push=owner/pushed", "--private"]) == 0
assert main([*arguments, "--push=owner"]) == 2
assert main([*arguments, "--private"]) == 2
params, description, *_ = convert.read_any("hf:owner/pushed")
assert (description.task, description.outputs, description.normalization) == ("classify", 5, "half")
np.savez("again.npz", **params)
"""
    result = run(script)
    assert result.returncode == 0, result.stderr
    assert f"pushed to {server.url}/owner/pushed/commit/" in result.stdout
    assert "a repository is written hf:OWNER/NAME" in result.stderr
    assert "error: --private: only with --push" in result.stderr
    repository = server.repositories["owner/pushed"]
    assert repository.private
    (files,) = [files for files in repository.commits.values() if files]
    assert {"config.json", "model.safetensors"} <= files.keys()
    again = np.load(tmp_path / "again.npz")
    for name, array in params.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_push_creates_a_repository_and_uploads(server, run, tmp_path):
    (tmp_path / "weights").write_bytes(b"0123" * 1000)
    (tmp_path / "settings").write_text("{}")
    script = """
from beit_jax.weights.hub import push, resolve
files = {"model.safetensors": "weights", "config.json": "settings"}
for message in ("first", "second"):
    print(push(files, repository="owner/new", private=True, message=message))
print(resolve("hf:owner/new"))
"""
    result = run(script, HF_TOKEN="hf_secret")
    assert result.returncode == 0, result.stderr
    first, second, folder = result.stdout.split()
    assert first.startswith(f"{server.url}/owner/new/commit/")
    assert second.startswith(f"{server.url}/owner/new/commit/")
    assert server.repositories["owner/new"].private
    assert (pathlib.Path(folder) / "model.safetensors").read_bytes() == b"0123" * 1000
    assert json.loads((pathlib.Path(folder) / "config.json").read_text()) == {}
