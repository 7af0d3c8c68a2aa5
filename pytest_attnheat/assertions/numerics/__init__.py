"""Assertions on the precision of attention, against float64."""
