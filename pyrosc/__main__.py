"""``python -m pyrosc`` is ``pyrosc``."""

from pyrosc.cli.command import main

main()
