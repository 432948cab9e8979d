"""The GRU's recurrence in Triton: the arithmetic of one step (cell), the forward and the backward recurrence."""
