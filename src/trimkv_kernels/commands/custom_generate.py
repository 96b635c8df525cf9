"""add the bounded generate to a model's folder

Writes custom_generate/ into the folder. transformers runs it if the model is loaded with
trust_remote_code=True and this package is installed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trimkv_kernels.commands import _options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", help="folder of the model")
    parser.add_argument("--policy", help="registered name; default: chosen by patch() when used")
    _options.add_sizes(parser)
    parser.add_argument(
        "--prefill-chunk",
        type=_options.count,
        help="prompts are read in chunks of this many tokens",
    )


def run(options: argparse.Namespace) -> None:
    """Write the folder."""
    from trimkv_kernels.custom_generate import write_custom_generate
    from trimkv_kernels.loading import check_model_name

    if not Path(options.folder).is_dir():
        raise ValueError(f"folder must be the folder of a model: there is no {options.folder}")
    check_model_name(options.folder)
    written = write_custom_generate(
        options.folder,
        policy=options.policy,
        budget=options.budget,
        buffer=options.buffer,
        prefill_chunk=options.prefill_chunk,
    )
    print(f"wrote {written}: load the model with trust_remote_code=True")
