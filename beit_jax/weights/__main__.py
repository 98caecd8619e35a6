"""`python -m beit_jax.weights`: export, import, convert-tokenizer, inspect."""

import argparse
import os
import sys

from beit_jax.preprocessing import NORMALIZATIONS

_FORMATS = """\
formats:
  hugging_face  a folder that transformers' from_pretrained loads
  timm          a .safetensors file that timm.create_model loads strictly
  unilm         a .pth file that the official BEiT scripts load (writing it takes PyTorch)
"""
_ALLOWED = "NAME is a name, a module (lm_head) or a glob; may be given several times"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(
        prog="python -m beit_jax.weights",
        description="Weights in and out: Hugging Face, timm, unilm, and DALL-E's tokenizer.",
        epilog="Each command has its own --help.",
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = dict(formatter_class=argparse.RawDescriptionHelpFormatter)

    command = commands.add_parser(
        "export",
        help="a checkpoint → Hugging Face, timm or unilm",
        description="Writes a checkpoint in a foreign format. Only the checkpoint and the config"
        " saved\nin it are needed, whatever number of devices wrote it.",
        epilog=f"{_FORMATS}\nexample:\n  python -m beit_jax.weights export runs/beit_base"
        " --format hugging_face --output beit_base_hf",
        **shared,
    )
    command.add_argument(
        "source", help="a run's workdir, one checkpoint in it, or a foreign checkpoint"
    )
    command.add_argument("--format", required=True, choices=("hugging_face", "timm", "unilm"))
    command.add_argument("--output", required=True, help="folder or file to write")
    command.add_argument("--image-size", type=int, help="resize positions to this image size")
    _allow(command, "unused", "leave our parameter NAME out")

    command = commands.add_parser(
        "import",
        help="Hugging Face, timm or unilm → a checkpoint for config.run.init_from",
        description="Writes a foreign checkpoint, pre-trained or fine-tuned, as one of ours. The"
        " result\nis good for config.run.init_from and for export. (config.run.init_from takes a"
        " foreign\ncheckpoint directly, too.)",
        epilog="example:\n  python -m beit_jax.weights import beit_base_patch16_224_pt22k.pth"
        " --output imported",
        **shared,
    )
    command.add_argument("source", help="Hugging Face folder, .safetensors or .pth")
    command.add_argument("--output", required=True, help="folder to write")
    command.add_argument("--image-size", type=int, help="resize positions to this image size")
    command.add_argument(
        "--per-block",
        action="store_true",
        help="copy a shared relative-position table to every block, as fine-tuning has it",
    )
    _source_options(command)
    _allow(command, "missing", "go on without foreign key NAME")
    _allow(command, "unused", "ignore foreign key NAME")

    command = commands.add_parser(
        "convert-tokenizer",
        help="DALL-E's encoder.pkl and decoder.pkl, FLAVA's codebook → one safetensors file",
        description="Writes DALL-E's weights as the file config.tokenizer.path names. Pickles are"
        " read\nwithout running code from them.",
        epilog="example:\n"
        "  wget -O encoder.pkl https://cdn.openai.com/dall-e/encoder.pkl   # capital O\n"
        "  wget -O decoder.pkl https://cdn.openai.com/dall-e/decoder.pkl\n"
        "  python -m beit_jax.weights convert-tokenizer --encoder encoder.pkl"
        " --decoder decoder.pkl \\\n      --output dalle.safetensors\n\n"
        "The encoder may also be FLAVA's image codebook (facebook/flava-image-codebook) or\n"
        "OpenMMLab's dalle_encoder.pth.",
        **shared,
    )
    command.add_argument("--encoder", required=True, help=".pkl, .pth, .bin or .safetensors")
    command.add_argument("--decoder", default="", help="likewise; only pictures need it")
    command.add_argument("--output", required=True, help="the .safetensors file to write")
    command.add_argument("--encoder-sha256", default="", metavar="HEX", help="check the file")
    command.add_argument("--decoder-sha256", default="", metavar="HEX", help="check the file")
    command.add_argument("--vocabulary", type=int, default=8192, help="tokens (default 8192)")
    command.add_argument("--width", type=int, default=256, help="channels (default 256)")

    command = commands.add_parser(
        "inspect",
        help="what a checkpoint holds, in any format",
        description="Prints what a checkpoint or tokenizer file holds: format, architecture, names,"
        " shapes,\nSHA-256. Runs nothing from it.",
        **shared,
    )
    command.add_argument("source", help="any checkpoint or file of weights")
    return whole


def _source_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--sha256", default="", metavar="HEX", help="check the file")
    command.add_argument(
        "--normalization",
        default="",
        choices=tuple(NORMALIZATIONS),
        help="of the pixels, where the format doesn't say (default: half)",
    )
    command.add_argument(
        "--heads",
        type=int,
        default=0,
        help="attention heads, where the format doesn't say (default: width / 64)",
    )


def _allow(command: argparse.ArgumentParser, what: str, effect: str) -> None:
    command.add_argument(
        f"--allow-{what}",
        action="append",
        default=[],
        metavar="NAME",
        help=f"{effect}; {_ALLOWED}",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; what goes wrong is one line on stderr and exit code 2."""
    options = parser().parse_args(arguments)
    # Converting needs no accelerator, and must not take one from a running job.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from absl import logging

    from beit_jax.config import ConfigError
    from beit_jax.tokenizers.loading import TokenizerFileError

    logging.set_verbosity(logging.ERROR)  # Orbax warns of metadata that it then finds elsewhere
    run = {
        "export": _export,
        "import": _import,
        "convert-tokenizer": _convert_tokenizer,
        "inspect": _inspect,
    }[options.command]
    try:
        run(options)
    except BrokenPipeError:  # the reader has seen enough: `inspect x | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ConfigError, TokenizerFileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _export(options: argparse.Namespace) -> None:
    from beit_jax.weights.convert import export_checkpoint

    done = export_checkpoint(
        options.source,
        format=options.format,
        output=options.output,
        image_size=options.image_size,
        allow_unused=options.allow_unused,
    )
    print(done.report)
    print(f"wrote {done.output}; load it with\n  {done.load}")


def _import(options: argparse.Namespace) -> None:
    from beit_jax.weights.convert import import_checkpoint

    report, description, sha256 = import_checkpoint(
        options.source,
        output=options.output,
        image_size=options.image_size,
        per_block=options.per_block,
        sha256=options.sha256,
        normalization=options.normalization,
        heads=options.heads,
        allow_missing=options.allow_missing,
        allow_unused=options.allow_unused,
    )
    print(f"SHA-256 {sha256}")
    print(report)
    print(_sentence(description))
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


def _sentence(description) -> str:
    from beit_jax.weights.inspection import sentence

    return sentence(description)


if __name__ == "__main__":
    sys.exit(main())
