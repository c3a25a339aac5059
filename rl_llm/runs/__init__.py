"""A run on disk and on the terminal: settings, checkpoints, records, reports, signals."""
