"""Many devices and many processes: what lies where, and how processes meet."""
