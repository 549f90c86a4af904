"""VHDX without a parent: open, replay, read, allocate, log, write and create."""
