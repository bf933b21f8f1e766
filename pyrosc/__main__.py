"""``python -m pyrosc`` is ``pyrosc``."""

from pyrosc.cli import main

main()
