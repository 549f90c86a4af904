"""VHD: open, read, allocate, write and create."""
