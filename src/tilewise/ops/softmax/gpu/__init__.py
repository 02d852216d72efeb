"""The softmax, its logarithm and log-sum-exp in Triton."""
