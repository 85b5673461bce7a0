"""Planning: calibration, fits, plans, search and its front."""
