"""What the machine is and what a computation takes from it."""
