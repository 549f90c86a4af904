"""Whole commands between real processes."""
