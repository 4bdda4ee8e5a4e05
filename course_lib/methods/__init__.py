"""Methods: what the course teaches: pure functions on tensors, and thin classes over them."""
