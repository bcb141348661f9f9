"""Networks as lists of blocks from Activation to Activation."""
