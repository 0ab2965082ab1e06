"""A run's numbers -> pictures and one self-contained HTML page."""
