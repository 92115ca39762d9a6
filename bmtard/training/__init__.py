"""Trains and evaluates B-MTARD and the methods it is compared with."""
