"""Quantisation profiles, calibration data and quantisers."""
