"""Many devices and many processes: how arrays are sharded, and how processes synchronise."""
