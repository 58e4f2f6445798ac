"""Credit: advantages, losses, token weights and their measurements."""
