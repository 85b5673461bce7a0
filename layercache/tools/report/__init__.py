"""Tables, plots and pages of profiles, schedules, fronts and measurements."""
