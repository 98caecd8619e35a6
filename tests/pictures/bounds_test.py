"""What can't work is one line that names the option, before anything is loaded or drawn."""

import types

import numpy as np
import pytest
from PIL import Image

from beit_jax.config import ConfigError
from beit_jax.features.command import reporting
from beit_jax.pictures import bounds, command, inputs, masks, reconstruct
from beit_jax.weights.report import WeightsError


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["segments", "embedded", "--weights=w", "--count=99999999999999999999"], "--count: 9999"),
        (["segments", "embedded", "--weights=w", "--count=0"], "--count: 0;"),
        (["segments", "embedded", "--weights="], "--weights: is empty"),
        (["augment", "--count=2000", "--config=f"], "--count: 2000; must be 1 to 1000"),
        (["masks", "--seed=4294967296"], "--seed: 4294967296;"),
        (["masks", "--seed=-1"], "--seed: -1;"),
        (["masks", "--grid=250"], "--grid: 250; must be 2 to 128"),
        (["masks", "--grid=1"], "--grid: 1;"),
        (["masks", "--mask-count=0"], "--mask-count: 0;"),
        (["masks", "--mask-count=196"], "--mask-count: 196; must be 1 to 195"),
        (["masks", "--output="], "--output: is empty"),
        (["masks", "--output=/proc/x.png"], "--output: can't write /proc/x.png"),
    ],
)
def test_values_out_of_range_are_one_line(arguments, said, tmp_path, capsys):
    output = tmp_path / "o"
    given = [arguments[0], f"--output={output}", *arguments[1:]]
    assert command.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not output.exists()


def test_an_output_that_is_a_link_to_itself_or_within_a_file_is_refused(tmp_path):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "file").touch()
    for name in ("loop.png", "file/x.png"):
        with pytest.raises(ConfigError, match="--output: can't write"):
            bounds.check_output(str(tmp_path / name), makes_folder=True)
    bounds.check_output(str(tmp_path / "new" / "x.png"), makes_folder=True)
    with pytest.raises(ConfigError, match="there is no folder"):
        bounds.check_output(str(tmp_path / "new" / "x.json"), makes_folder=False)


def test_what_tensorflow_says_of_a_path_is_one_line():
    error = type("Failed", (Exception,), {"__module__": "tensorflow.python"})("a\nb")
    said = "--weights: can't reach gs://x: a b"
    with pytest.raises(ConfigError, match=said), bounds.naming("--weights", "gs://x"):
        raise error
    with pytest.raises(KeyError), bounds.naming("--weights", "w"):
        raise KeyError


def test_a_damaged_file_of_a_folder_is_named_and_left_out(tmp_path, capsys):
    for name in "ac":
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{name}.png")
    damaged = tmp_path / "b.png"
    damaged.write_bytes(b"no image")
    found = list(inputs._files([str(tmp_path)], count=2_000_000_000))
    assert [name for name, _ in found] == ["a.png", "c.png"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: can't read {damaged}")
    with pytest.raises(ConfigError, match="IMAGES: can't read"):
        list(inputs._files([str(damaged)], count=1))
    for name in "ac":
        (tmp_path / f"{name}.png").unlink()
    with pytest.raises(ConfigError, match="none of 1 images"):
        list(inputs._files([str(tmp_path)], count=1))


def test_large_grids_are_drawn_less_often(monkeypatch):
    drawn = []

    def draw(config, *, count, grid, seed):
        drawn.append(count)
        return np.zeros((count, grid, grid), bool)

    monkeypatch.setattr(masks, "draw_masks", draw)
    for grid in (14, 28, 64):
        masks.draw(command.parsed(["masks", f"--grid={grid}", "--output=o"]))
    assert drawn == [4096, 1024, 196]


def test_the_flag_of_a_message_is_this_commands(capsys):
    def fail():
        raise WeightsError("f has no average: --weights model")

    assert reporting(fail, interrupted="") == 2
    assert capsys.readouterr().err == "error: f has no average: --which=model\n"


def test_a_tokenizer_that_is_gone_is_looked_for_beside_the_run(tmp_path, monkeypatch):
    def load(source, **_):
        if source.endswith("tokenizer"):
            return types.SimpleNamespace(grid=4, paints=True, source=source)
        raise FileNotFoundError("no file t")

    monkeypatch.setattr(reconstruct, "load_tokenizer", load)
    run = tmp_path / "pretrain"
    run.mkdir()
    with pytest.raises(ConfigError, match="--tokenizer: no file t; add --tokenizer=FILE"):
        reconstruct.painter(str(run), grid=4)
    (tmp_path / "tokenizer").mkdir()
    assert reconstruct.painter(str(run), grid=4).source == str(tmp_path / "tokenizer")
