"""The shapes, options and inputs that every implementation is tried on, per operator."""
