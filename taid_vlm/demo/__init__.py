"""The offline demo: two small worlds, their trained teachers and warm-started students."""
