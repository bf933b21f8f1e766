"""Makes training steps fast: recorded, rewritten, verified, replayed. Tensors only; see its README."""
