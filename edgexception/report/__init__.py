"""What a run found, as data and as a page."""
