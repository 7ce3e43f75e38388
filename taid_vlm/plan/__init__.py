"""How much memory a recipe needs, before any weights are loaded."""
