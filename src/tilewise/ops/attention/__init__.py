"""Softmax attention: `spec` says what is promised, `reference` is the mathematics."""
