"""How answers are read and scored: pure functions on text, one module per family of rules."""
