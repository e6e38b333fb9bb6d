"""What a program is made of, and which of its channels are coupled, for people."""
