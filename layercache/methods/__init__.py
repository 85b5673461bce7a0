"""Published caching methods, one file each, as schedules of the one executor."""
