"""Instruments that look into a trained model."""
