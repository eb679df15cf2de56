"""Errors, settings, files and the command line: what every other package stands on."""
