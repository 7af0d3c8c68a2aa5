"""A picture against its baseline: as data, then as pixels."""
