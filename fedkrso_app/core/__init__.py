"""The mathematics: plain functions on tensors, without Flower, transformers, files or global randomness."""
