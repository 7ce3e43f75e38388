"""The demo's two worlds, and the training of its models; `data/generate.py` is the way in."""
