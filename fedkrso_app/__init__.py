"""Federated fine-tuning by exchanging seeds and accumulators (FedKRSO) beside its baselines, on Flower."""
