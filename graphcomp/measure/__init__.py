"""What a program costs and how good it is."""
