"""Foundations shared by every operator: errors, dimensions, masks and types."""
