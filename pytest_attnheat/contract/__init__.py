"""Examine an implementation of attention, and name what is wrong with it."""
