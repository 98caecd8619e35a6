"""What holds no weights, or not those of one model, is refused in one line that names it."""

import json
from collections.abc import Callable

import numpy as np
import pytest

from beit_jax.weights import folders, native, opening
from beit_jax.weights.__main__ import main
from beit_jax.weights.report import WeightsError
from tests.weights import examples, saved_files
from tests.weights.saved_files import (
    deepspeed,
    deepspeed_folder,
    one_line,
    save_hf,
    tensors,
    zip_of,
    zipped_file,
)  # fmt: skip


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch writes the files")


@pytest.fixture(scope="module")
def state():
    return saved_files.state()


REFUSED: dict[str, tuple[Callable, str]] = {
    "no tensors": (
        lambda f, t, s: (t.save({"epoch": 3, "config": {"a": 1}}, f / "x.pth"), f / "x.pth")[1],
        r"holds no tensors of a model; its keys are epoch, config$",
    ),
    "an empty dict": (
        lambda f, t, s: (t.save({}, f / "x.pth"), f / "x.pth")[1],
        "holds no tensors of a model; its keys are none",
    ),
    "a tensor": (
        lambda f, t, s: (t.save(t.ones(2), f / "x.pth"), f / "x.pth")[1],
        "holds a ndarray, no state dict",
    ),
    "two sets": (
        lambda f, t, s: (
            t.save({"student": tensors(t, s), "teacher": tensors(t, s)}, f / "x.pth"),
            f / "x.pth",
        )[1],
        "holds several sets of tensors, student, teacher, and which is the model is not known",
    ),
    "two variants": (
        lambda f, t, s: save_hf(f, t, s, names=("model.fp16.safetensors", "model.x.safetensors")),
        r"several variants of its weights, model\.fp16\.safetensors, model\.x\.safetensors",
    ),
    "two files": (
        lambda f, t, s: save_hf(f, t, s, names=("a.safetensors", "b.safetensors")),
        r"several files of weights, a\.safetensors, b\.safetensors; give the path of one",
    ),
    "shards without an index": (
        lambda f, t, s: save_hf(f, t, s, names=("model-00001-of-00002.safetensors",)),
        "without the index that names them",
    ),
    "one shard": (
        lambda f, t, s: (
            save_hf(f, t, s, names=("model-00001-of-00002.safetensors",))
            / "model-00001-of-00002.safetensors"
        ),
        "is one of several files of weights; give their folder",
    ),
    "checkpoints": (
        lambda f, t, s: (
            save_hf(f / "checkpoint-500", t, s),
            save_hf(f / "checkpoint-1000", t, s),
            f,
        )[2],
        "holds no weights itself; give one of checkpoint-500, checkpoint-1000 in it",
    ),
    "Flax": (
        lambda f, t, s: save_hf(f, t, s, names=("flax_model.msgpack",)),
        r"holds flax_model\.msgpack, which is not read",
    ),
    "an adapter": (
        lambda f, t, s: save_hf(f, t, s, names=("adapter_model.safetensors",)),
        "holds an adapter, not a model",
    ),
    "torch.distributed": (
        lambda f, t, s: (
            (f / "__0_0.distcp").write_bytes(b"x"),
            t.save({"epoch": 3}, f / "meta.pt"),
            f,
        )[2],
        "torch.distributed.*dcp_to_torch",
    ),
    "two in a zip": (
        lambda f, t, s: zip_of(f / "x.zip", {"a.pth": b"", "b.pth": b""}),
        r"holds 2 files of weights \(a\.pth, b\.pth\); unpack it",
    ),
    "none in a zip": (
        lambda f, t, s: zip_of(f / "x.zip", {"a.txt": b""}),
        "holds no weights; unpack it",
    ),
    "ZeRO-3": (
        lambda f, t, s: zero3(f, t),
        "ZeRO-3, whose weights are in pieces.*zero_to_fp32",
    ),
    "a file of ZeRO-3": (
        lambda f, t, s: zero3(f, t) / "global_step10" / "zero_pp_rank_0_mp_rank_00_model_states.pt",
        "only empty tensors.*zero_to_fp32",
    ),
    "two ranks": (
        lambda f, t, s: (
            (deepspeed_folder(f, t, s) / "global_step10/mp_rank_01_model_states.pt").touch(),
            f,
        )[1],
        "tensor parallelism, which is not read",
    ),
    "a tag elsewhere": (
        lambda f, t, s: ((deepspeed_folder(f, t, s) / "latest").write_text("../x"), f)[1],
        r"the file latest names no folder: '\.\./x'",
    ),
    "a tag that is gone": (
        lambda f, t, s: ((deepspeed_folder(f, t, s) / "latest").write_text("step9"), f)[1],
        "the file latest names step9, which is not there",
    ),
}


def zero3(folder, torch):
    """Every process saves the parameters' names with nothing in them."""
    (folder / "global_step10").mkdir()
    (folder / "latest").write_text("global_step10")
    whole = deepspeed(torch, {"cls_token": torch.empty(0), "norm.bias": torch.empty(0)})
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save(whole, folder / "global_step10" / name)
    return folder


@pytest.mark.parametrize("row", REFUSED)
def test_what_is_not_one_model_is_refused_by_name(torch, state, tmp_path, row):
    write, message = REFUSED[row]
    path = write(tmp_path, torch, state)
    assert opening.is_foreign(str(path))
    with pytest.raises(WeightsError, match=message) as error:
        opening.open_file(str(path))
    assert str(tmp_path) in one_line(error)


TEXTS = {
    b"": "is empty",
    b"  \n": "is blank",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n": "Git-LFS.*git lfs pull",
    "<!DOCTYPE html>\n<html>é</html>".encode(): "is a web page, not weights",
    b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AuthenticationFailed</Code>": "is a web page",
    b"404: Not Found": "is a text file, not weights; it starts with '404: Not Found'$",
    "Fehler: Seite nicht gefunden, schöne Grüße".encode(): "is a text file",
    b"\x1f\x8b\x08\x00": "compressed by gzip",
    b"\x89HDF\r\n": "an HDF5 file",
    bytes(257) + b"ustar\x0000": "is a tar archive",
}


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "model.bin", "x.zip"])
@pytest.mark.parametrize("content", TEXTS, ids=list(TEXTS.values()))
def test_what_is_no_weights_at_all_is_said(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=TEXTS[content]) as error:
        opening.open_file(str(tmp_path / name))
    assert "wget" not in one_line(error)


HEADERS = {
    "metadata is a list": {"__metadata__": [1]},
    "metadata of numbers": {"__metadata__": {"timm": 3}},
    "metadata of dicts": {"__metadata__": {"timm": {"name": "x"}}},
    "no JSON": "{x",
    "a list": "[1]",
    "deep": '{"a":' + "[" * 100_000,
}


@pytest.mark.parametrize("row", HEADERS)
def test_odd_safetensors_headers_are_one_line(tmp_path, row):
    header = HEADERS[row]
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(WeightsError, match="is not a whole safetensors file") as error:
        opening.open_file(str(path))
    assert len(one_line(error)) < 1000


@pytest.mark.parametrize("metadata", [None, {}, {"timm": "x"}])
def test_safetensors_metadata(state, tmp_path, metadata):
    whole = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": metadata}
    text = json.dumps(whole).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    opened = opening.open_file(str(path))
    assert opened.metadata == (metadata or {})
    assert opened.state["x"].tolist() == [0]


def test_a_zip_that_is_cut_off(torch, state, tmp_path):
    path = zipped_file(tmp_path, torch, state)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="zip file that is damaged, cut off or locked") as error:
        opening.open_file(str(path))
    one_line(error)


@pytest.mark.parametrize("text", ["[1]", '"x"', "{", "", "[" * 100_000, "\xff"])
@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"]
)
def test_json_that_is_no_object_is_one_line(torch, state, tmp_path, name, text):
    folder = save_hf(tmp_path, torch, state, names=() if "index" in name else folders.NAMES[:1])
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=f"{name} (is no JSON|holds a (list|str), not)") as error:
        opening.open_file(str(folder))
    assert len(one_line(error)) < 1000


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://huggingface.co/owner/name", r"is written hf:owner/name$"),
        (
            "https://huggingface.co/owner/name/resolve/main/x.safetensors",
            "is written hf:owner/name",
        ),
        ("hf://owner/name", "is written hf:owner/name"),
        ("https://example.com/x.pth", "download it first"),
        ("s3://bucket/x.pth", "download it first"),
        ("file:///tmp/x.pth", r"give the path alone, /tmp/x\.pth"),
        ("owner/name", r"does not exist; a repository of the hub is written hf:owner/name"),
    ],
)
def test_sources_that_are_no_paths_are_told_what_to_give(source, message, capsys):
    with pytest.raises(WeightsError, match=message) as error:
        opening.open_file(source)
    one_line(error)
    for command in ("inspect", "import", "export"):
        arguments = {"inspect": [], "import": [], "export": ["--format=timm"]}[command]
        output = [] if command == "inspect" else ["--output=/nowhere/x.safetensors"]
        assert main([command, source, *arguments, *output]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_checkpoint_of_this_project_needs_no_import(tmp_path):
    examples.saved(tmp_path / "native", examples.PRETRAINED["plain"])
    with pytest.raises(WeightsError, match="is a checkpoint of this project; use it as it is"):
        opening.open_file(str(tmp_path / "native"))


def test_a_folder_is_not_ours_for_the_names_in_it(torch, state, tmp_path):
    folder = save_hf(tmp_path, torch, state)
    (folder / "state").mkdir()
    (folder / "checkpoints" / "500").mkdir(parents=True)
    assert not native.is_checkpoint(str(folder))
    assert opening.open_file(str(folder)).state.keys() == state.keys()


def test_a_config_that_is_a_folder_is_one_line(torch, state, tmp_path):
    folder = save_hf(tmp_path, torch, state)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(WeightsError, match=r"config\.json can't be read"):
        opening.open_file(str(folder))


def test_what_is_no_checkpoint_at_all_is_not_foreign(tmp_path):
    assert not opening.is_foreign(str(tmp_path / "nothing"))
    assert not opening.is_foreign(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert not opening.is_foreign(str(tmp_path))
    assert opening.is_foreign("hf:owner/name")
    assert opening.is_foreign(str(tmp_path / "gone.ckpt"))


@pytest.mark.parametrize("kind", ["zip of a pickle", "pickle", "safetensors", "index"])
def test_damage_never_gives_another_error(torch, state, tmp_path, kind):
    """Any bytes changed: the file is read, or one line says what is wrong with it."""
    path = {
        "zip of a pickle": lambda: zipped_file(tmp_path, torch, state),
        "pickle": lambda: saved_files.renamed_zip(tmp_path, torch, state),
        "safetensors": lambda: saved_files.prefixed_safetensors(tmp_path, torch, state),
        "index": lambda: saved_files.sharded_safetensors(tmp_path, state) / folders.NAMES[1],
    }[kind]()
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    failed: list[str] = []
    # The header is where damage matters, and numbers are most of a file.
    spots = np.r_[0 : min(600, len(content)), max(0, len(content) - 2000) : len(content)]
    for _ in range(150):
        damaged = bytearray(content)
        for position in rng.choice(spots, rng.integers(1, 4)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged[: rng.choice([len(content), rng.integers(len(content))])])
        try:
            opening.open_file(str(path))
        except WeightsError as error:
            failed.append(str(error))
    assert len(failed) > 50
    assert not any("\n" in text for text in failed)
