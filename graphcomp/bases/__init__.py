"""What the author of a pass derives from."""
