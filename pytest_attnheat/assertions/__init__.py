"""Assertions on attention. They know nothing of pytest."""
