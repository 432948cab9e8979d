"""The family ``additive``: softmax(weight . tanh(query + key)) value, Bahdanau's attention."""
