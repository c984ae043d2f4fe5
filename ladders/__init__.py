"""Ladders of stages: every stage trained, every rung measured, a table and a figure."""
