"""Tuning: records of what was measured, and the machines to measure on."""
