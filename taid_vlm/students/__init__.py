"""Students: small models made from larger ones, or put together from parts."""
