"""Passes, plans, and the one check: `rewrite(simulate(p)) == simulate(p)`."""
