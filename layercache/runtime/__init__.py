"""The executor of schedules and methods inside a transformer's forward pass."""
