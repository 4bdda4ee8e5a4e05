"""Evidence: how we know: numbers, intervals, pictures."""
