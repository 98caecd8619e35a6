"""Evaluation of frozen features: the features themselves, k-NN and a linear probe."""
