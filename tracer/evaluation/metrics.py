"""Accuracy and calibration of predicted probabilities."""

from __future__ import annotations

CALIBRATION_BINS = 15
