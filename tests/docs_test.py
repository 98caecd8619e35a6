"""The documentation names only files, headings, commands, settings and recipes that exist."""

import dataclasses
import functools
import importlib
import pathlib
import re

import numpy as np
import pytest

import beit_jax
from beit_jax.weights import convert
from tests.weights import examples, segmenter_test

ROOT = pathlib.Path(__file__).parent.parent
# Folders of the repository; what users make in it (runs/, .venv/) may hold Markdown of its own.
FOLDERS = ("beit_jax", "bench", "configs", "docs", "examples", "launch", "tests")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
)
README_WORDS = 1000

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
INLINE_CODE = re.compile(r"`([^`\n]+)`")


def test_pages_are_found():
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "docs/README.md", "launch/README.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_existing_files_and_headings(page):
    assert not broken_links(page.read_text(), folder=page.parent, own=page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_and_commands_exist(page):
    text = page.read_text()
    assert not missing_paths(text)
    assert not missing_commands(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_exist(page):
    """A command's overrides fit its own config; a setting in the text fits any config."""
    text = page.read_text()
    assert not unknown_overrides(text)
    known = set().union(*(settings(recipe.stem) for recipe in recipes()))
    named = {name for code in INLINE_CODE.findall(text) for name in _settings_in(code)}
    assert not named - known


def test_names_of_the_library_exist():
    missing = []
    for page in PAGES:
        for language, body in FENCE.findall(page.read_text()):
            names = re.findall(r"\bbeit_jax\.([a-z]\w*)", body) if language == "python" else []
            missing += [f"{page.name}: {name}" for name in names if not _in_library(name)]
    assert not missing


@pytest.mark.parametrize(
    "page", ["README.md", pytest.param("docs/library.md", marks=pytest.mark.slow)]
)
def test_the_librarys_examples_run_as_written(page, tmp_path, monkeypatch):
    """With a small checkpoint of as many blocks as base has, under the names that the page uses."""
    description = examples.PRETRAINED["beit+"]
    description = dataclasses.replace(
        description, model=dataclasses.replace(description.model, layers=12, drop_path_rate=0.0)
    )
    monkeypatch.chdir(tmp_path)
    for name in ("runs/base", "runs/quickstart/pretrain"):
        examples.saved(tmp_path / name, description)
    segmenter_test.saved(tmp_path / "runs/camvid", segmenter_test.SEGMENTER)
    size = description.model.image_size
    images = np.zeros((2, size, size, 3), np.uint8)
    if "beit.stablehlo" in (ROOT / page).read_text():
        convert.export_checkpoint("runs/base", format="stablehlo", output="beit.stablehlo")
    bodies = [
        body for language, body in FENCE.findall((ROOT / page).read_text()) if language == "python"
    ]
    assert bodies
    names = {"images": images, "images_uint8": images, "image": np.zeros((60, 80, 3), np.uint8)}
    for body in bodies:
        exec(compile(body, page, "exec"), names)


def test_the_readme_is_short():
    words = prose_words((ROOT / "README.md").read_text())
    assert 300 < words <= README_WORDS, f"{words} words of prose"


def test_every_recipe_is_documented():
    text = "\n".join(page.read_text() for page in PAGES if page.parent.name == "docs")
    missing = [recipe.stem for recipe in recipes() if not re.search(rf"\b{recipe.stem}\b", text)]
    assert not missing


def test_every_package_has_a_readme():
    packages = sorted(path.parent for path in (ROOT / "beit_jax").rglob("__init__.py"))
    missing = [str(folder.relative_to(ROOT)) for folder in packages[1:] if not _readme(folder)]
    assert not missing


def test_the_index_links_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    linked = {pathlib.Path(target).name for target in LINK.findall(index)}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= linked


# ---- The checks report what is wrong -------------------------------------------------------------


def test_broken_links_are_reported(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title, with `code`\n[a](#a-title-with-code) [b](no.md) [c](#nowhere)\n")
    (tmp_path / "other.md").write_text("## There\n")
    text = page.read_text() + "[d](other.md#there) [e](other.md#here) [f](https://example.org)\n"
    assert broken_links(text, folder=tmp_path, own=page) == ["no.md", "#nowhere", "other.md#here"]


def test_missing_paths_and_commands_are_reported():
    text = (
        "`beit_jax/config/parse.py` `beit_jax/nowhere.py` `jobs.py` `configs/no_recipe.py`\n"
        "```bash\npython main.py --config=configs/absent.py\n"
        "python -m beit_jax.weights inspect x\npython -m beit_jax.types\nlaunch/absent.sh\n```\n"
    )
    assert missing_paths(text) == ["beit_jax/nowhere.py", "configs/no_recipe.py"]
    assert missing_commands(text) == [
        "--config=configs/absent.py",
        "python -m beit_jax.types",
        "launch/absent.sh",
    ]


def test_unknown_overrides_are_reported():
    text = (
        "```bash\npython main.py --config=configs/beit_base.py --config.run.seed=1 \\\n"
        "  --config.run.sed=2 --config.classes=3\n```\n"
    )
    assert unknown_overrides(text) == ["beit_base: run.sed", "beit_base: classes"]


def test_words_of_code_tables_and_links_targets_do_not_count():
    text = (
        "# One\n\ntwo `three` [four](docs/five.md)\n\n| a | b |\n\n```bash\nc d\n```\n![e f](g)\n"
    )
    assert prose_words(text) == 4


# ---- The checks ----------------------------------------------------------------------------------


def broken_links(text: str, *, folder: pathlib.Path, own: pathlib.Path) -> list[str]:
    """Relative links of a page whose file or heading does not exist."""
    broken = []
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve() if path else own
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", LINK.sub("", heading).lower()).replace(" ", "-")
        found.add(slug)
    return found


def missing_paths(text: str) -> list[str]:
    """Inline code that looks like a path in the repository, and isn't one."""
    missing = []
    for code in INLINE_CODE.findall(FENCE.sub("", text)):
        top, _, _ = code.partition("/")
        looks_like_a_path = re.fullmatch(r"[\w.\-/]+", code) and top in FOLDERS and "/" in code
        if looks_like_a_path and not (ROOT / code).exists():
            missing.append(code)
    return missing


def missing_commands(text: str) -> list[str]:
    """Config files, modules and scripts that commands name and that can't be run."""
    commands = "\n".join(
        [body for language, body in FENCE.findall(text) if language in ("bash", "")]
        + INLINE_CODE.findall(FENCE.sub("", text))
    )
    missing = [
        f"--config={path}"
        for path in re.findall(r"--config=(configs/\w+\.py)", commands)
        if not (ROOT / path).exists()
    ]
    missing += [
        f"python -m {name}"
        for name in re.findall(r"python -m (beit_jax[\w.]*)", commands)
        if not _runnable(name)
    ]
    missing += [
        f"beit-jax {name}"
        for name in re.findall(r"(?m)(?:^|`)beit-jax (\w[\w-]*)", commands)
        if not _command_exists(name)
    ]
    missing += [
        script
        for script in re.findall(r"(?:^|[\s`])((?:launch|tests|\.ci)/\w+\.sh)", commands)
        if not (ROOT / script).exists()
    ]
    return missing


def unknown_overrides(text: str) -> list[str]:
    """`--config.key=value` in commands, where the config that they name has no such setting."""
    unknown = []
    for language, body in FENCE.findall(text):
        if language != "bash":
            continue
        for line in body.replace("\\\n", " ").splitlines():
            recipe = re.search(r"--config=configs/(\w+)\.py", line)
            if recipe is None or not (ROOT / "configs" / f"{recipe[1]}.py").exists():
                continue
            names = re.findall(r"--config\.([\w.]+)=", line)
            known = settings(recipe[1])
            unknown += [f"{recipe[1]}: {name}" for name in names if name not in known]
    return unknown


def prose_words(text: str) -> int:
    """Words of a page outside code blocks, tables and pictures; a link counts by its text."""
    lines = FENCE.sub("", text).splitlines()
    prose = "\n".join(line for line in lines if not line.startswith(("|", "![")))
    prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    return len(re.findall(r"\w[\w'’./-]*", prose))


def recipes() -> list[pathlib.Path]:
    return [path for path in sorted((ROOT / "configs").glob("*.py")) if path.stem != "__init__"]


@functools.cache
def settings(recipe: str) -> frozenset[str]:
    """Every setting of a recipe, and every section of it, by its dotted name."""
    names: set[str] = set()

    def visit(section, prefix: str) -> None:
        for key, value in section.items():
            names.add(f"{prefix}{key}")
            if hasattr(value, "items"):
                visit(value, f"{prefix}{key}.")

    visit(importlib.import_module(f"configs.{recipe}").get_config(), "")
    return frozenset(names)


def _settings_in(code: str) -> list[str]:
    """`config.run.seed` as `run.seed`, also in an override; not the file `config.json`."""
    names = re.findall(r"(?:^|[^\w./])config\.([a-z_]\w*(?:\.[a-z_]\w*)*)", code)
    return [name for name in names if name not in ("json", "get")]


def _runnable(module: str) -> bool:
    """Whether `python -m` does something with it."""
    path = ROOT / module.replace(".", "/")
    if (path / "__main__.py").exists():
        return True
    file = path.with_suffix(".py")
    return file.exists() and '__name__ == "__main__"' in file.read_text()


def _command_exists(name: str) -> bool:
    from beit_jax import cli

    return name in cli.COMMANDS


def _in_library(name: str) -> bool:
    """A public name, or a module that can be imported by its own name."""
    folder = ROOT / "beit_jax"
    return name in dir(beit_jax) or any((folder / end).exists() for end in (name, f"{name}.py"))


def _readme(folder: pathlib.Path) -> bool:
    page = folder / "README.md"
    return page.exists() and len(page.read_text().split()) > 20
