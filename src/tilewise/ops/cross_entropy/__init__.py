"""The cross-entropy of logits with class indices or class probabilities."""
