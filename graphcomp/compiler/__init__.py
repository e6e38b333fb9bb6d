"""From a model and a recipe to a directory that can be deployed, checked and resumed."""
