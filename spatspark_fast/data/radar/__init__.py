"""Read raw radar files of each provider as frames of rain in mm per 5 min."""
