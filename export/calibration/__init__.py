"""Calibration: what layers and experts see, the GPTQ driver, sensitivity and the choice of schemes that follow."""
