"""What frozen features are worth: the features themselves, k-NN and a linear probe."""
