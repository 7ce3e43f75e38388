"""The pair doctor: whether a recipe can work, what is compared, and what to change, untrained."""

from taid_vlm.doctor.doctor import Inspection, inspect_recipe

__all__ = ["Inspection", "inspect_recipe"]
