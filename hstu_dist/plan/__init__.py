"""Memory and time of a run on hardware that need not exist: closed forms, no torch."""
