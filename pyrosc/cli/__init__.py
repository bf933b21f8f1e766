"""The command ``pyrosc``."""
