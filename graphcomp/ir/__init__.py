"""What a program is: a traced network as a value, its operators, its text, its files."""
