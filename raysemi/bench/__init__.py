"""What `raysemi bench` measures: the work that raysemi does against the least work that could do the same."""
