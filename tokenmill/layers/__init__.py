"""What models are made of: linear, norm, rope, embedding, attention, MLP and experts."""
