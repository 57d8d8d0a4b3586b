"""What is computed once and kept, whatever is drawn from it."""
