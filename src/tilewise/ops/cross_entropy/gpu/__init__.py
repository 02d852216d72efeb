"""The cross-entropy in Triton."""
