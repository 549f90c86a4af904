"""What changed: fingerprints of what the replica holds, and the sources of change that feed a log."""
