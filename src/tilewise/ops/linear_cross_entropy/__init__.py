"""Cross-entropy of a linear classifier, whose logits are never stored."""
