"""Training on events that keep arriving: files of a folder or bucket become windows of time, each trained on once."""
