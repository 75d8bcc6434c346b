"""What may be done to a model's weights before or while they are quantized, given how its inputs look."""
