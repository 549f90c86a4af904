"""The command line: parse, call, render. Nothing here knows how a disk, a log or a store works."""
