"""The command line: its arguments, and what they run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pyrosc import __version__
from pyrosc.cli.demo import demo


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Parameters
    ----------
    argv
        Arguments after the name of the program; the process's own by default.

    Raises
    ------
    SystemExit
        With status 1 and a message if the demo can't run, 2 if the arguments are wrong.
    """
    args = _parser().parse_args(argv)
    # Matrices this small are multiplied no faster by several threads, and far slower on busy cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        demo(args.output, epochs=2 if args.smoke else args.epochs, smoke=args.smoke, seed=args.seed)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        torch.set_num_threads(threads)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "pyrosc", description="Pyro generative models for single-cell RNA counts."
    )
    parser.add_argument("--version", action="version", version=f"pyrosc {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    about = "fit a VAE to 700 real blood cells and write down what it found; one to two minutes, no download"
    command = commands.add_parser("demo", help=about, description=about.capitalize() + ".")
    command.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="default: demo")
    command.add_argument("--epochs", type=_positive, metavar="N", help="default: chosen from the data")
    command.add_argument("--seed", type=int, default=0, help="of the split and the fit; default: 0")
    command.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        msg = f"{text!r} is no whole number of at least 1"
        raise argparse.ArgumentTypeError(msg)
    return int(text)
