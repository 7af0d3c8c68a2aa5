"""What attention is: scoring, masks, one call in plain sight, in float64, and taken wrongly."""
