"""Assertions on code that one can only call: what must not change its output."""
