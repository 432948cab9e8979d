"""Attention in Triton: masks, biases and dropout of a tile (scores), the forward and the backward pass."""
