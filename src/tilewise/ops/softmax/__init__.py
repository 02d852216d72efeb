"""Softmax, log-softmax and log-sum-exp along any axes."""
