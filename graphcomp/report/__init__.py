"""Results for people: pages, plots, words."""
