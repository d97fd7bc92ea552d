"""How good samples are, in numbers: each metric takes images as uint8 arrays, and no file."""
