"""Measurements on machines with a GPU."""
