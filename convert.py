"""Turns a network file into another format, with every tensor and all it holds besides unchanged.

    python convert.py network-snapshot-020000.pkl student.safetensors
    python convert.py student.safetensors student.pkl
    python convert.py student.pkl weights.pt        # the bare state_dict, for torch.load(..., weights_only=True)
    python convert.py weights.pt student.pkl --like=network.pkl

The format of SRC is found from its content, that of DST from its name.
"""

from __future__ import annotations

import os
import sys
from functools import partial

from dnnlib import cli  # before packages: it prints what to do where they are missing

# isort: split
import click

from dnnlib.atomic import check_target
from dnnlib.util import is_url, local_path

FORMATS = (".pkl", ".safetensors", ".pt")


@cli.command(name="convert")
@click.argument("src", metavar="SRC")
@click.argument("dst", metavar="DST")
@click.option(
    "--half", help="Store the parameters in half precision  [default: as SRC]", metavar="BOOL", type=cli.Bool()
)
@click.option("--like", help="SRC is a bare state dict; all else is as in this network file", metavar="PATH|URL")
@click.option("--overwrite", help="Replace DST where it exists", is_flag=True)
@cli.trust_option
def command(src: str, dst: str, half: bool | None, like: str | None, overwrite: bool, trust_network_code: bool) -> None:
    """Turn the network file SRC (path or URL; EDM's .pkl or .safetensors) into DST.

    \b
    DST ends in
      .pkl           EDM's pickle, which EDM's own code opens
      .safetensors   weights, and all the rest as JSON metadata
      .pt            the weights alone: a state_dict for torch.load

    The new file is read again and compared, tensor by tensor, before it takes DST's name. A DST that is a link is
    replaced, not followed.

    A network of foreign code stays a .pkl with that code, or becomes bare weights.

    \b
    Examples:
      python convert.py network-snapshot-020000.pkl student.safetensors
      python convert.py student.safetensors student-again.pkl
      python convert.py student.pkl weights.pt
    """
    suffix = os.path.splitext(dst)[1]
    if suffix not in FORMATS:
        raise cli.UsageError(f"DST={dst}: its name must end in one of {', '.join(FORMATS)}")
    if is_url(dst, allow_file_urls=True):
        raise cli.UsageError(f"DST={dst}: is an address; give a path to write to")
    check_target(dst)
    local = "" if is_url(src) else local_path(src)
    if os.path.exists(local) and os.path.exists(dst) and os.path.samefile(local, dst):
        raise cli.UsageError(f"SRC and DST are the same file, {dst}")
    if os.path.lexists(dst) and not overwrite:
        raise cli.UserError(f"{dst} exists already; choose another name, or --overwrite")

    from formats.network_files import convert_network, load_network, with_weights

    file = load_network(like or src, trust_network_code=trust_network_code)
    print(f"Found {file.describe()}")
    if like is not None:
        file = with_weights(file, src)
        print(f"Found the weights of such a network in {src}")
    if file.foreign_code and dst.endswith(".pkl"):
        print(f"Note: {dst} carries the file's code on, so all that load it need --trust-network-code")
    convert_network(file, dst, half=half)
    print(f"Wrote {dst}, {os.path.getsize(dst) / 1e6:.2f} MB")
    if file.ignored:
        print(f"Not plain data, and left out: {', '.join(file.ignored)}")
    if suffix == ".pt":
        grid = "its noise grid (sampling) and " if file.sampling else ""
        print(f"A state_dict holds the weights alone: without {grid}the arguments that build the network")


main = partial(cli.run, command)

if __name__ == "__main__":
    sys.exit(main())
