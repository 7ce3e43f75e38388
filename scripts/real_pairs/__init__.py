"""TAID and its rivals on real models: pairs, methods, the order of arms, and the table."""
