"""Saved programs: a closed grammar of graph, modules and tensors, read as if an attacker had written it."""
