"""Networks: encoders, decoders, heads."""
