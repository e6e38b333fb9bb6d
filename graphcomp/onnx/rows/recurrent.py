"""Rows of recurrent layers."""
