"""Live capture: serve a protected disk to its VM over NBD, and know every write."""
