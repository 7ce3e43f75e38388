"""Answers of a model, written as records to train on."""
