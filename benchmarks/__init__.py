"""Standing networks, measuring scripts and their results; not part of the installed package."""
