"""The family ``gru``: a layer of nn.GRU, in one or both directions."""
