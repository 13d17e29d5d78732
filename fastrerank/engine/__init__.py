"""Packed forwards of encoders: family tables and the native CPU engine."""
