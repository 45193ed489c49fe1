"""Input builders and the case table of each op, one module per group."""
