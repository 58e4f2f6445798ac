"""Training runs with verifiable rewards: a small one that ``relexkit demo`` makes and analyses."""
