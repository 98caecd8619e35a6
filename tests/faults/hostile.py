"""Hostile files: every reader refuses them in one line or takes no harm, and runs nothing of them.

    soak(count=800, seed=0, folder=folder)

Each call is made in a process of its own, forked from one that has imported everything, with
bounded memory and time. What counts as survived: the call ends in time, with a value or with one
line that says why not; no code in the file has run; nothing was written but the call's own output.
"""

import dataclasses
import functools
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults import hostile_files
from tests.faults.hostile_files import Content
from tests.faults.row import Row

SECONDS = 30  # of one call, on a machine with other things to do
_MEMORY = 6 << 30  # of address space beyond what the process has when a call begins
_LONGEST = 4500  # characters of a line

# target → readers, and the parts of the target that are made hostile
TARGETS = {
    "model.pth": ("inspect", "import", "encoder", "convert"),
    "model.safetensors": ("inspect", "import", "encoder", "export"),
    "model.zip": ("inspect", "import"),
    "tokenizer.safetensors": ("tokenizer", "params"),
    "hf": ("inspect", "import", "encoder"),
    "sharded": ("inspect", "import"),
    "checkpoint": ("inspect", "export", "encoder"),
    "old": ("inspect", "export", "encoder"),  # a checkpoint without digests
    "set": ("set",),
    "run": ("directory", "inspect"),
    "record.json": ("record",),
}


def readers() -> dict[str, Callable[[Path, Path], object]]:
    """What reads a target, by name: (path, folder for output) → an exit code, or anything else."""
    import beit_jax
    import beit_jax.pretrained.loading
    import beit_jax.pretrained.tokenizer
    import beit_jax.weights.convert
    import beit_jax.weights.dalle
    import beit_jax.weights.inspection
    from beit_jax.data.sources import prepared
    from beit_jax.tasks import token_cache
    from beit_jax.tokenizers import loading
    from beit_jax.tokenizers.dvae import DvaeConfig
    from beit_jax.training import run_directory
    from beit_jax.weights.__main__ import main

    def read_set(path: Path, out: Path) -> object:
        opened = prepared.open_set(str(path), setting="config.data.source")
        try:
            return opened.read(0)
        except RuntimeError:  # ArrayRecord's own hashes: it counts as a bad image
            return None

    def params(path: Path, out: Path) -> object:
        config = DvaeConfig(width=8, vocabulary=32, image_size=32, levels=2, codebook_width=12)
        return loading.load_params(dataclasses.replace(config, path=str(path)))

    return {
        "inspect": lambda path, out: main(["inspect", str(path)]),
        "import": lambda path, out: main(["import", str(path), f"--output={out}/in"]),
        "export": lambda path, out: main(
            ["export", str(path), "--format=hugging_face", f"--output={out}/ex"]
        ),
        "convert": lambda path, out: main(
            ["convert-tokenizer", f"--encoder={path}", f"--output={out}/t.safetensors"]
        ),
        "encoder": lambda path, out: beit_jax.load_encoder(str(path)),
        "tokenizer": lambda path, out: beit_jax.load_tokenizer(str(path)),
        "params": params,
        "set": read_set,
        "record": lambda path, out: token_cache._differences(path, {"a": 1}),
        "directory": lambda path, out: run_directory.check_contents(str(path)),
    }


def make_bases(folder: Path) -> None:
    """Valid targets, which the hostile ones differ from in one part."""
    import jax
    import numpy as np
    import safetensors.numpy
    import torch
    from PIL import Image

    from beit_jax.data import prepare
    from beit_jax.files import write_json
    from beit_jax.tokenizers.dvae import DvaeConfig
    from beit_jax.tokenizers.loading import open_tokenizer, save_params
    from beit_jax.weights.__main__ import main
    from tests.weights import examples

    folder.mkdir(parents=True)
    examples.saved(folder / "checkpoint", examples.PRETRAINED["beit+"])
    examples.saved(folder / "run/checkpoints/1", examples.PRETRAINED["beit+"])
    shutil.copy(folder / "checkpoint/config/metadata", folder / "run/config.json")
    write_json(folder / "run/summary.json", {"steps": 1})
    (folder / "run/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    write_json(folder / "record.json", {"a": 1})
    (source, hf) = (str(folder / "checkpoint"), folder / "hf")
    assert main(["export", source, "--format=hugging_face", f"--output={hf}"]) == 0
    state = safetensors.numpy.load_file(hf / "model.safetensors")
    shutil.copytree(hf, folder / "sharded")
    shard = "model-00001-of-00001.safetensors"
    (folder / "sharded/model.safetensors").rename(folder / "sharded" / shard)
    index = {"weight_map": dict.fromkeys(state, shard)}
    write_json(folder / "sharded/model.safetensors.index.json", index)
    shutil.copy(hf / "model.safetensors", folder / "model.safetensors")
    plain = {key: torch.from_numpy(np.array(array)) for key, array in state.items()}
    torch.save({"model": plain}, folder / "model.pth")
    content = (folder / "model.pth").read_bytes()
    (folder / "model.zip").write_bytes(hostile_files.zip_of({"a.pth": content}))
    config = DvaeConfig(width=8, vocabulary=32, image_size=32, levels=2, codebook_width=12)
    params = open_tokenizer(config).init(jax.random.key(0))
    save_params(folder / "tokenizer.safetensors", params, config=config)
    for number in range(12):
        path = folder / f"pictures/{number % 2}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (number, 9, 9)).save(path)
    pictures, output = f"folder:{folder}/pictures", str(folder / "set")
    header = prepare.prepare(prepare.PrepareConfig(source=pictures, output=output, max_side=32))
    # Whoever changes a file can leave out its digest, as older versions did.
    for name in ("sha256", "labels_sha256"):
        header.pop(name, None)
    write_json(folder / "set/prepared.json", header)
    shutil.copytree(folder / "checkpoint", folder / "old")
    shutil.rmtree(folder / "old/digests")
    (folder / "old/_CHECKPOINT_METADATA").unlink()


def cases(bases: Path, canary: Path, seed: int) -> Iterator[tuple[str, str, str, Content]]:
    """(target, part of it or "", kind, content) of every hostile target, in no particular order."""
    texts, special = hostile_files.json_texts(), hostile_files.special()
    pickles = hostile_files.pickles(canary)
    junk = {"empty": b"", "text": b"hello\n" * 20_000, "zeros": bytes(10**6), "page": b"<html>"}
    headers = hostile_files.headers((bases / "model.safetensors").read_bytes())
    whole: dict[tuple[str, str], dict[str, Content]] = {
        ("model.pth", ""): {**special, **junk, **texts}
        | {f"zip {key}": hostile_files.torch_zip(text) for key, text in pickles.items()}
        | {f"stream {key}": hostile_files.torch_stream(text) for key, text in pickles.items()}
        | {f"bare {key}": text for key, text in pickles.items()},
        ("model.safetensors", ""): {**special, **junk, **headers},
        ("model.zip", ""): {**special, **hostile_files.zips((bases / "model.pth").read_bytes())},
        ("tokenizer.safetensors", ""): {
            **junk,
            **special,
            **hostile_files.headers((bases / "tokenizer.safetensors").read_bytes()),
        },
        ("set", "labels.npy"): {**special, **junk, **hostile_files.arrays()},
        ("set", "images-00000-of-00001.array_record"): {**special, **junk},
        ("run", "metrics.jsonl"): {**special, **junk, **texts},
        ("checkpoint", "state/manifest.ocdbt"): {**special, **junk},
        ("old", "state/manifest.ocdbt"): {**special, **junk},
        ("sharded", "model-00001-of-00001.safetensors"): {**special, **junk},
    }
    objects = [
        *(("hf", "config.json"), ("hf", "preprocessor_config.json"), ("set", "prepared.json")),
        *(("run", "config.json"), ("run", "summary.json"), ("record.json", "")),
        *(("sharded", "model.safetensors.index.json"), ("checkpoint", "config/metadata")),
        *(("checkpoint", name) for name in ("digests/metadata", "state/_METADATA")),
        *(("old", name) for name in ("config/metadata", "state/_METADATA", "digests/metadata")),
        *(("checkpoint", name) for name in ("_CHECKPOINT_METADATA", "state/_sharding")),
    ]
    for target, part in objects:
        whole[target, part] = {**special, **texts}
        path = bases / target / part if part else bases / target
        if path.is_file():
            whole[target, part] |= _changed_leaves(path.read_bytes(), seed)
    for (target, part), kinds in whole.items():
        for kind, content in kinds.items():
            yield target, part, kind, content
        path = bases / target / part if part else bases / target
        if path.is_file():
            for kind, content in _damaged(path.read_bytes(), seed).items():
                yield target, part, kind, content


def _changed_leaves(content: bytes, seed: int) -> dict[str, Content]:
    """A JSON object with one value of another kind, at places drawn by the seed."""
    rng = random.Random(seed)
    made: dict[str, Content] = {}
    for number, value in enumerate(hostile_files.VALUES * 3):
        changed = place = json.loads(content)
        path: list[str | int] = []
        while isinstance(place, dict | list) and place and (not path or rng.random() < 0.7):
            inside, key = (
                place,
                rng.choice(list(place if isinstance(place, dict) else range(len(place)))),
            )
            path.append(key)
            place = inside[key]
        if path:
            inside[key] = value
        name = f"{number}: {'/'.join(map(str, path))[:60]} = {json.dumps(value)[:30]}"
        made[name] = json.dumps(changed).encode()
    return made


def _damaged(content: bytes, seed: int) -> dict[str, Content]:
    """A file that ends early, and with bytes of another value."""
    rng = random.Random(seed)
    made: dict[str, Content] = {}
    for number in range(8):
        made[f"cut {number}"] = content[: rng.randrange(1 + len(content))]
        changed = bytearray(content)
        for _ in range(1 + number if content else 0):  # most of what is not weights is at the ends
            place = rng.choice((rng.randrange(len(content)), rng.randrange(min(500, len(content)))))
            changed[rng.choice((place, -1 - place))] = rng.randrange(256)
        made[f"bytes {number}"] = bytes(changed)
    return made


def soak(*, count: int, seed: int, folder: Path) -> Row:
    """Makes `count` calls; all there are, where there are fewer."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "tests.faults.hostile", str(folder)]
    root = Path(__file__).parents[2]
    subprocess.run([*command, "bases"], cwd=root, env=environment, check=True)
    result = subprocess.run(
        [*command, str(count), str(seed)],
        cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found = json.loads(result.stdout.splitlines()[-1])
    failures = tuple(found["failures"])
    tried = found["tried"]
    note = f"{found['refused']} refused, {found['harmless']} without harm; at most"
    note += f" {found['seconds']:.1f} s a call"
    return Row(
        part="hostile", tried=tried, survived=tried - len(failures), failures=failures, note=note
    )


def calls(folder: Path, *, count: int, seed: int) -> dict[str, object]:
    """Does the work of `soak` in this process, which must not have started any thread of JAX'."""
    bases, canary = folder / "bases", folder / "canary"
    reads = readers()
    planned = [
        (*case, reader) for case in cases(bases, canary, seed) for reader in TARGETS[case[0]]
    ]
    random.Random(seed).shuffle(planned)
    planned = planned[:count]
    outcomes = {"refused": 0, "harmless": 0}
    failures, longest = [], 0.0
    for number, (target, part, kind, content, reader) in enumerate(planned, 1):
        if number % 100 == 0:
            print(f"{number} of {len(planned)} calls", file=sys.stderr, flush=True)
        place = folder / "call"
        path = place / target
        shutil.rmtree(place, ignore_errors=True)
        (place / "out").mkdir(parents=True)
        _make(bases / target, path, part=part, content=content)
        before = _listing(folder)
        began = time.monotonic()
        outcome = _call(functools.partial(reads[reader], path, place / "out"), place / "said")
        longest = max(longest, time.monotonic() - began)
        if canary.exists():
            canary.unlink()
            outcome = "it ran the file's code"
        if _listing(folder) != before or Path("/tmp/escaped.pth").exists():
            outcome = "it wrote outside of its output"
        if outcome in outcomes:
            outcomes[outcome] += 1
        else:
            failures.append(f"{reader} of {target} with {part or 'itself'} = {kind}: {outcome}")
            print(failures[-1], file=sys.stderr, flush=True)
    shutil.rmtree(folder / "call", ignore_errors=True)
    return {"tried": len(planned), "failures": failures, "seconds": longest, **outcomes}


def _make(base: Path, path: Path, *, part: str, content: Content) -> None:
    if part:
        shutil.copytree(base, path)
        path = path / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)


def _listing(folder: Path) -> list[str]:
    """What is there beside the files of the call itself."""
    return sorted(entry.name for at in (folder, folder / "bases") for entry in at.iterdir())


def _call(read: Callable[[], object], said: Path) -> str:
    """ "refused", "harmless", or what is wrong about how a call ended."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = "it raised nothing and returned nothing"
        try:
            os.setpgid(0, 0)
            with said.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, size + _MEMORY))
            outcome = _outcome(read, said)
        finally:
            os.write(sender, outcome.encode(errors="replace")[:2000])
            os._exit(0)
    os.close(sender)
    in_time = select.select([receiver], [], [], SECONDS)[0]
    outcome = os.read(receiver, 4000).decode() if in_time else f"no end within {SECONDS} s"
    os.close(receiver)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return outcome or f"the process died, status {status}: {said.read_bytes()[-300:]!r}"


def _outcome(read: Callable[[], object], said: Path) -> str:
    from beit_jax.config import ConfigError, RunError
    from beit_jax.tokenizers.loading import TokenizerFileError

    try:
        result = read()
    except (ConfigError, RunError, TokenizerFileError, FileNotFoundError) as error:
        text = str(error)
        fine = 0 < len(text) <= _LONGEST and "\n" not in text
        return "refused" if fine else f"not one line but {text[:500]!r}"
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:150]!r} in {at.filename}:{at.lineno}"
    sys.stdout.flush()
    sys.stderr.flush()
    lines = [line for line in said.read_text(errors="replace").splitlines() if line]
    if any("Traceback" in line for line in lines):
        return f"a traceback on stderr: {lines[-1][:300]}"
    if not isinstance(result, int) or result == 0 or isinstance(result, bool):
        return "harmless"
    errors = [line for line in lines if line.startswith("error: ")]
    if len(errors) == 1 and lines[-1] == errors[0] and len(errors[0]) <= _LONGEST:
        return "refused"
    return f"status {result} and {len(lines)} lines: {lines[-3:]}"[:800]


if __name__ == "__main__":
    if sys.argv[2] == "bases":
        make_bases(Path(sys.argv[1]) / "bases")
    else:
        whole = calls(Path(sys.argv[1]), count=int(sys.argv[2]), seed=int(sys.argv[3]))
        print(json.dumps(whole))
