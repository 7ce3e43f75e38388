"""The parts of scripts/real_vlm.py."""
