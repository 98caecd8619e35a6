"""JSON that somebody else wrote is an object or one line, quickly."""

import json
import os

import pytest

from beit_jax.json_text import JsonError, json_object, read_json_object

HOSTILE = {
    "empty": b"",
    "blank": b"  \n",
    "cut off": b'{"a": [1, 2',
    "text": b"<!doctype html>",
    "binary": b"\x80\x04\x95\xff\x00",
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "list": b"[1]",
    "number": b"3",
    "string": b'"config"',
    "null": b"null",
    "nested lists": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested and unclosed": b"[" * 1_000_000,
    "equal keys": b'{"a": 1, "b": {"c": 1, "c": 1}}',
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "beyond float64": b'{"a": 1e999}',
    "many digits": b'{"a": ' + b"9" * 5000 + b"}",
    "many values": b"[" + b"[]," * 3_000_000 + b"1]",
    "large": b'{"a": "' + b"a" * (17 << 20) + b'"}',
    "escaped quotes without an end": b'{"a": "' + b'\\"' * 1_000_000,
    "quotes without an end": b'{"a": ' + b'"\\' * 1_000_000,
    "control characters": b'{"a": "\n"}',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_object_is_refused_in_one_line(kind):
    with pytest.raises(JsonError, match=r"^my path ") as caught:
        json_object(HOSTILE[kind], path="my path")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_object_is_what_it_says():
    value = {"a": [1, -2.5, '[[{\\"', None, True], "b": {"c": {}}, "é": 10**39, "": "\ud800"}
    assert json_object(json.dumps(value), path="here") == value
    assert json_object(json.dumps(value, ensure_ascii=True).encode(), path="here") == value


def test_brackets_in_strings_do_not_nest():
    assert json_object(json.dumps({"a": "[" * 1000 + '"' * 1000}), path="here")["a"][0] == "["


def test_sixty_four_levels_are_read():
    text = '{"a": ' + "[" * 63 + "]" * 63 + "}"
    assert json_object(text, path="here")
    with pytest.raises(JsonError, match="nested too deep"):
        json_object(f'{{"a": {text}}}', path="here")


def test_a_log_may_hold_what_is_not_finite():
    assert json_object('{"a": NaN, "b": 1e999}', path="here", finite=False)["b"] == float("inf")


def test_a_file_is_read_or_named(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"a": 1}')
    assert read_json_object(file) == read_json_object(str(file)) == {"a": 1}
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, why in {
        "absent": "No such file",
        ".": "regular file",
        "pipe": "not a regular file",
        "zero": "not a regular file",
        "a" * 300: "too long",
        "\0": "can't be read",
    }.items():
        with pytest.raises(JsonError, match=why) as caught:
            read_json_object(f"{tmp_path}/{name}")
        assert "\n" not in str(caught.value)


def test_a_file_is_not_read_beyond_the_limit(tmp_path):
    file = tmp_path / "config.json"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(JsonError, match="larger than the 16777216 bytes"):
        read_json_object(file)
