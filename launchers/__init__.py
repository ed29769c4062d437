"""Launchers: runs that are submitted to a scheduler."""
