"""Rows that move elements: transpose, concatenate, slice, gather, pad, resize."""
