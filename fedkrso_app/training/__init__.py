"""One model and its local training: loading, steps, memory for the backward pass, metrics."""
