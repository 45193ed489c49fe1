"""Language models with random weights in the formats of every engine."""
