"""Where trials run: each module says what it would do, and does it."""
