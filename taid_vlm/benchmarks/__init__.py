"""Benchmarks: questions to a model, its answers, and what they are worth."""
