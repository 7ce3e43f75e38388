"""A miniature of the TAID paper, measured on exactly known languages and small models."""
