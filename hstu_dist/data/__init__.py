"""From event logs to jagged batches: prepare, data set, split, loader."""
