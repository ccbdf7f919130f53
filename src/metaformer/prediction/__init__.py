"""Predictions for single images: class names, tables, heat maps and pictures."""
