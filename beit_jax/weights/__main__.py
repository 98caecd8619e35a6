"""`python -m beit_jax.weights`: export, import, convert-tokenizer, inspect."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from beit_jax.weights.formats.format import Stated

_ALLOWED = "NAME is a name, a module (lm_head) or a glob; may be given several times"


class _Command(NamedTuple):
    """One command: its name, its line in the overview, its options, and what runs it."""

    name: str
    help: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def parser() -> argparse.ArgumentParser:
    """The command line; formats are those in `formats.FORMATS` now."""
    whole = argparse.ArgumentParser(
        prog="python -m beit_jax.weights",
        description=f"Weights in and out: {', '.join(_formats())}, and DALL-E's tokenizer.",
        epilog="Each command has its own --help.",
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        added = commands.add_parser(
            command.name,
            help=command.help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add(added)
    return whole


def _formats(*, only_readable: bool = False) -> dict[str, str]:
    """Name → line of help."""
    from beit_jax.weights.formats import FORMATS

    if only_readable:
        return {name: row.help for name, row in FORMATS.items() if row.reader}
    return {
        name: f"{row.help} (writing {row.writing})" if row.writing else row.help
        for name, row in FORMATS.items()
    }


def _format_table(formats: dict[str, str]) -> str:
    from beit_jax.text_table import text_table

    return text_table([("", name, line) for name, line in formats.items()])


def _add_export(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Writes a checkpoint in a foreign format. Only the checkpoint and the config saved\nin it"
        " are needed, whatever number of devices wrote it."
    )
    command.epilog = (
        f"formats:\n{_format_table(_formats())}\n\nexample:\n"
        "  python -m beit_jax.weights export runs/beit_base --format hugging_face"
        " --output beit_base_hf"
    )
    command.add_argument(
        "source",
        help="a run's workdir, one checkpoint in it, a foreign checkpoint or hf:OWNER/NAME",
    )
    command.add_argument("--format", required=True, choices=tuple(_formats()))
    command.add_argument("--output", required=True, help="folder or file to write")
    _add_image_size(command)
    _add_conversion(command)
    _add_allow(command, "missing", "go on without a foreign checkpoint's key NAME")
    _add_allow(command, "unused", "leave out parameter, or a foreign checkpoint's key, NAME")
    command.add_argument(
        "--push",
        default="",
        metavar="OWNER/NAME",
        help="upload the result to this repository on the hub, made where it is missing",
    )
    command.add_argument("--private", action="store_true", help="make that repository private")


def _add_import(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Writes a foreign checkpoint, pre-trained or fine-tuned, as one of this project's. The"
        "\nresult is good for config.run.init_from and for export. (config.run.init_from takes a"
        "\nforeign checkpoint directly, too.)"
    )
    command.epilog = (
        f"formats:\n{_format_table(_formats(only_readable=True))}\n\nexample:\n"
        "  python -m beit_jax.weights import beit_base_patch16_224_pt22k.pth --output imported"
    )
    command.add_argument(
        "source", help="a file or folder in one of the formats below, or hf:OWNER/NAME[@REVISION]"
    )
    command.add_argument("--output", required=True, help="folder to write")
    _add_image_size(command)
    _add_conversion(command)
    _add_allow(command, "missing", "go on without foreign key NAME")
    _add_allow(command, "unused", "ignore foreign key NAME")


def _add_convert_tokenizer(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Writes DALL-E's weights as the file that config.tokenizer.path names. Pickles are read\n"
        "without running code from them."
    )
    command.epilog = (
        "example:\n"
        "  wget -O encoder.pkl https://cdn.openai.com/dall-e/encoder.pkl   # capital O\n"
        "  wget -O decoder.pkl https://cdn.openai.com/dall-e/decoder.pkl\n"
        "  python -m beit_jax.weights convert-tokenizer --encoder encoder.pkl"
        " --decoder decoder.pkl \\\n      --output dalle.safetensors\n\n"
        "The encoder may also be FLAVA's image codebook (facebook/flava-image-codebook) or\n"
        "OpenMMLab's dalle_encoder.pth."
    )
    command.add_argument("--encoder", required=True, help=".pkl, .pth, .bin or .safetensors")
    command.add_argument("--decoder", default="", help="as the encoder; only pictures need it")
    command.add_argument("--output", required=True, help="the .safetensors file to write")
    command.add_argument("--encoder-sha256", default="", metavar="HEX", help="check the file")
    command.add_argument("--decoder-sha256", default="", metavar="HEX", help="check the file")
    command.add_argument("--vocabulary", type=int, default=8192, help="tokens (default 8192)")
    command.add_argument("--width", type=int, default=256, help="channels (default 256)")


def _add_inspect(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Prints what a checkpoint or tokenizer file holds: format, architecture, names,"
        " shapes,\nSHA-256. Runs nothing from it."
    )
    command.add_argument("source", help="any checkpoint or file of weights, or hf:OWNER/NAME")


def _add_image_size(command: argparse.ArgumentParser) -> None:
    command.add_argument("--image-size", type=int, help="resize positions to this image size")


def _add_conversion(command: argparse.ArgumentParser) -> None:
    """What both directions take: facts that a foreign file may not say, and its tables."""
    command.add_argument(
        "--per-block",
        action="store_true",
        help="copy a shared relative-position table to every block, as fine-tuning has it",
    )
    command.add_argument("--sha256", default="", metavar="HEX", help="check a foreign file")
    command.add_argument(
        "--normalization",
        default="",
        choices=_normalizations(),
        help="of the pixels, in place of what the file says (half, where it does not)",
    )
    command.add_argument(
        "--heads",
        type=int,
        default=0,
        help="attention heads, where the file doesn't say (default: width / 64)",
    )
    command.add_argument(
        "--epsilon",
        type=float,
        default=None,
        help="of the LayerNorms, in place of what the file says (1e-6, where it does not)",
    )
    command.add_argument(
        "--weights",
        default="",
        choices=("ema", "model"),
        help="of a training checkpoint with an average beside the model (default: a foreign file's"
        " average, as timm; a run's model)",
    )


def _add_allow(command: argparse.ArgumentParser, what: str, effect: str) -> None:
    command.add_argument(
        f"--allow-{what}",
        action="append",
        default=[],
        metavar="NAME",
        help=f"{effect}; {_ALLOWED}",
    )


def _normalizations() -> tuple[str, ...]:
    from beit_jax.preprocessing import NORMALIZATIONS

    return tuple(NORMALIZATIONS)


def _stated(options: argparse.Namespace) -> "Stated":
    from beit_jax.weights.formats.format import Stated

    return Stated(
        normalization=options.normalization,
        heads=options.heads,
        layer_norm_epsilon=options.epsilon,
        weights=options.weights,
    )


def _export(options: argparse.Namespace) -> None:
    from beit_jax.weights.convert import export_checkpoint

    done = export_checkpoint(
        options.source,
        format=options.format,
        output=options.output,
        image_size=options.image_size,
        per_block=options.per_block,
        sha256=options.sha256,
        stated=_stated(options),
        allow_missing=options.allow_missing,
        allow_unused=options.allow_unused,
        push=options.push,
        private=options.private,
    )
    print(done.report)
    print(f"wrote {done.output}; load it with\n  {done.load}")
    if done.commit:
        print(f"pushed to {done.commit}")


def _import(options: argparse.Namespace) -> None:
    from beit_jax.weights.convert import import_checkpoint
    from beit_jax.weights.description import sentence

    report, description, sha256 = import_checkpoint(
        options.source,
        output=options.output,
        image_size=options.image_size,
        per_block=options.per_block,
        sha256=options.sha256,
        stated=_stated(options),
        allow_missing=options.allow_missing,
        allow_unused=options.allow_unused,
    )
    print(f"SHA-256 {sha256}")
    print(report)
    print(sentence(description))
    print(f"wrote {options.output}; start from it with --config.run.init_from={options.output}")


def _convert_tokenizer(options: argparse.Namespace) -> None:
    from beit_jax.weights.dalle import convert_tokenizer

    done = convert_tokenizer(
        output=options.output,
        encoder=options.encoder,
        decoder=options.decoder,
        encoder_sha256=options.encoder_sha256,
        decoder_sha256=options.decoder_sha256,
        vocabulary=options.vocabulary,
        width=options.width,
    )
    for part, sha256 in done.sources.items():
        print(f"{part}: SHA-256 {sha256}\n{done.reports[part]}")
    print(f"wrote {done.output}, SHA-256 {done.sha256}")
    print(f"use it with --config.tokenizer.path={done.output} --config.tokenizer.sha256=...")


def _inspect(options: argparse.Namespace) -> None:
    from beit_jax.weights.inspection import inspect

    print(inspect(options.source))


_COMMANDS = (
    _Command("export", "write a checkpoint in a foreign format", _add_export, _export),
    _Command(
        "import",
        "a foreign checkpoint → one of this project's, for config.run.init_from",
        _add_import,
        _import,
    ),
    _Command(
        "convert-tokenizer",
        "DALL-E's encoder.pkl and decoder.pkl, FLAVA's codebook → one safetensors file",
        _add_convert_tokenizer,
        _convert_tokenizer,
    ),
    _Command("inspect", "list what a checkpoint holds, in any format", _add_inspect, _inspect),
)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: without the program's name; None takes the process'.

    Returns:
      The exit code: 2 where something went wrong, 74 where a disk is full or can't be used; one
      line on stderr says what.
    """
    # Converting needs no accelerator and must not take one from a running job. JAX reads this when
    # it is first imported, which the parser's formats do.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    options = parser().parse_args(arguments)
    from absl import logging

    from beit_jax import storage
    from beit_jax.config import ConfigError
    from beit_jax.tokenizers.loading import TokenizerFileError
    from beit_jax.verbosity import verbosity

    run = {command.name: command.run for command in _COMMANDS}[options.command]
    try:
        # Orbax warns of missing metadata even where it finds it in another file.
        with verbosity(logging.ERROR), storage.said_once():
            run(options)
            storage.flush_output()
    except BrokenPipeError:  # the reader has seen enough: `inspect x | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ConfigError, TokenizerFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        code = storage.failed(error, safe="what was there before is as it was")
        if code is None and not isinstance(error, OSError):
            raise
        if code is None:
            print(f"error: {error}", file=sys.stderr)
        return code or 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
