"""A chat in the terminal: `streamserve run`."""
