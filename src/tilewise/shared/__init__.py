"""What two or more operators use unchanged."""
