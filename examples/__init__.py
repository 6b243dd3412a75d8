"""Programs and modules that show the package at work."""
