"""Removing halted tokens changes nothing: a trained model, masked and with tokens removed, on a
whole test split.
"""
