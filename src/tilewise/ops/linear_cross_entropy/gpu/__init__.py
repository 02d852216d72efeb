"""The linear cross-entropy in Triton."""
