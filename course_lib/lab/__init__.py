"""Lab: the bench: data, models, training, many replicas at once."""
