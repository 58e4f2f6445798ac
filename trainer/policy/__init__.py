"""The policy: set-up, sampling, log-probabilities, the small embedded model."""
