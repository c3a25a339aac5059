"""Where trials run: each module can print its plan, and carry it out."""
