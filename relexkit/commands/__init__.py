"""Commands of relexkit that have a module of their own, and what several commands share."""
