"""Faults that a run must survive, as one table: `make faults`."""
