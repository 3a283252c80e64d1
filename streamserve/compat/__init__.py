"""Programs written for others, run here as they are."""
