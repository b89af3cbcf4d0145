"""What a trained model is worth: losses, distances of samples to data, and whether they obey."""
