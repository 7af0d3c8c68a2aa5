"""Attention weights out of models that nobody wrote for this."""
