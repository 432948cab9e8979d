"""The family ``attention``: softmax(query key^T) value, exactly, in linear memory."""
