"""Errors, settings, files and the command line, which all other packages use."""
