"""Attacks on every parser: see docs/testing.md."""
