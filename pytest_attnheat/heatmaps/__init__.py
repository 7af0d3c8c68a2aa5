"""Pictures of attention, drawn in whole pixels, and their terminal view."""
