"""Mathematics that two or more operators use unchanged."""
