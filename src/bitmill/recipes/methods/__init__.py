"""Named methods, one file each."""
