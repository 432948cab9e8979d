"""The GRU's recurrence in Triton: one step's arithmetic (cell), and the loops forward and backward."""
