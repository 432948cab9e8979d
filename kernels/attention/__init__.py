"""Attention in Triton: masks, biases and dropout of a tile (scores), and the passes forward and backward."""
